"""When a batch of the user's own is taken to be smaller than the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shardline
from shardline.data.short import ShortBatches


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([4, 4, 3], 3),
        ([4, 3, 2], 3),
        ([4, 4, 4], None),
        ([3, 4, 3], None),  # dimension 0 was something else before
        ([4, 8, 3], None),
        ([7, 5, 9], None),
        ([4, None, 3], None),
    ],
)
def test_a_smaller_batch_after_full_ones(rows, found) -> None:
    seen, short = [], ShortBatches(4)
    for count in rows:
        tensors = [torch.tensor(1.0), torch.ones(count, 2)] if count is not None else ["no tensor"]
        short.see(tensors[:1], dict(enumerate(tensors[1:])))
        seen.append(short.pop())
    assert [rows for rows in seen if rows is not None] == ([] if found is None else [found])


def own_loader(weighted):
    """Gradients of batches of 4 and 1 in one window, and what is said of them."""
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
    }
    engine, *_ = shardline.initialize(model=nn.Linear(1, 1, bias=False), config=config)
    notices = []
    engine.events.subscribe(lambda event: notices.append(getattr(event, "message", "")))
    start = engine.module.weight.detach().clone()
    for _ in range(2):
        for x in (torch.ones(4, 1), torch.full((1, 1), 6.0)):
            engine.backward(engine(x).sum() if weighted else engine(x).mean())
            engine.step(weight=len(x)) if weighted else engine.step()
    moved = float(start - engine.module.weight.detach())
    engine.destroy()
    return moved, [notice for notice in notices if notice]


def test_every_batch_of_the_users_counts_the_same_and_that_is_said(ranks) -> None:
    """Means of 1 and 6: their mean is 3.5 a step; over all samples it is 2, which ``weight`` gives."""
    ((moved, notices),) = ranks(own_loader, 1, False)
    assert moved == pytest.approx(7.0) and len(notices) == 1
    assert "a batch of 1 samples counts as one of 4" in notices[0] and "step(weight=samples)" in notices[0]
    assert ranks(own_loader, 1, True) == [(pytest.approx(4.0), [])]
