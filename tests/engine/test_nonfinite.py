"""``debug.find_nonfinite``: the module and parameter where numbers go bad are named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardline
from shardline.events import Notice


class InfiniteGradient(torch.autograd.Function):
    """Finite forward, and a gradient that is not."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 0.0


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop, self.act = nn.Linear(4, 4), nn.Dropout(0.1), nn.ReLU(inplace=True)

    def forward(self, x, what):
        x = self.linear(x)
        if what == "forward":
            x = x / 0.0
        if what == "backward":
            x = InfiniteGradient.apply(x)
        return self.act(self.drop(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(4, 1)

    def forward(self, x, what=""):
        for index, block in enumerate(self.blocks):
            x = block(x, what if index == 1 else "")
        return self.head(x)


def config(stage, **more):
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
        "zero_optimization": {"stage": stage, "unit_min_numel": 1, "stage3_param_persistence_threshold": 0},
        "debug": {"find_nonfinite": True},
        **more,
    }


def says(stage, whats, **more):
    """For each of ``whats`` a step that is bad by it, in micro-step 2 of rank 1, and a good step."""
    engine, *_ = shardline.initialize(model=Model(), config=config(stage, **more))
    rank, notices, found = engine.comm.data.rank, [], []
    engine.events.subscribe(lambda event: notices.append(event.message) if isinstance(event, Notice) else None)
    for what in whats:
        for bad in (what, ""):
            before = engine.full_state_dict()
            for micro_step in range(2):
                here = bad if (micro_step, rank) == (1, 1) else ""
                x, y = torch.randn(4, 4), torch.randn(4, 1)
                if here == "batch":
                    x[0, 0] = float("nan")
                output = engine(x, what=here)
                loss = F.mse_loss(output.float(), y)
                if here == "loss":
                    loss = loss + InfiniteGradient.apply(output.float()).sum()
                engine.backward(loss)
                engine.step()
            after = engine.full_state_dict()
            changed = any(not torch.equal(before[name], after[name]) for name in before)
            finite = all(bool(value.isfinite().all()) for value in after.values())
            found.append((changed, finite, engine.skipped_steps, [*notices]))
            notices.clear()
    with engine.gathered_parameters(write=True), torch.no_grad():
        engine.module.blocks[2].linear.bias[1] = float("inf")
    for _ in range(2):
        engine.backward(F.mse_loss(engine(torch.randn(4, 4)).float(), torch.randn(4, 1)))
        engine.step()
    engine.destroy()
    return found, notices


WORDS = {
    "forward": "the output of module 'blocks.1.drop' (Dropout) is the first that is not finite",
    "backward": "all outputs are finite, and the gradient of parameter 'blocks.1.linear.bias' is the first that is not",
    "batch": "what the model is given is not finite",
    "loss": "the model's output is finite, and the gradient that the loss gives to it is not",
}


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        (3, {}),
        pytest.param(1, {}, marks=pytest.mark.slow),
        pytest.param(3, {"bf16": {"enabled": True}}, marks=pytest.mark.slow),
    ],
    ids=["stage 3", "stage 1", "bf16"],
)
def test_where_numbers_go_bad_is_named_on_all_ranks(ranks, stage, more):
    results = ranks(says, 2, stage, list(WORDS), **more)
    for found, of_weight in results:
        for number, (what, words) in enumerate(WORDS.items()):
            (changed, finite, skipped, notices), good = found[2 * number : 2 * number + 2]
            assert not changed and finite and skipped == number + 1
            (notice,) = [each for each in notices if "were not finite" in each]
            assert notice.startswith(f"the gradients of step {2 * number + 1} were not finite, "), notice
            assert notice.endswith(f". In its micro-step 2 on rank 1 {words}"), notice
            loss = "and so was the loss" if what in ("forward", "batch") else "of a finite loss ("
            assert loss in notice, notice
            assert good[0] and good[1] and good[2] == number + 1 and good[3] == []
        assert len(of_weight) == 1
        assert of_weight[0].endswith(
            "In its micro-step 1 on rank 0 the values of parameter 'blocks.2.linear.bias' are not finite"
        )


def count_hooks():
    """Of the model without the key, with it, and after the end."""
    found = []
    for debug in ({}, {"find_nonfinite": True}):
        engine, *_ = shardline.initialize(model=Model(), config={**config(3), "debug": debug})
        model = engine.module
        found.append((len(model._forward_hooks), len(model._forward_pre_hooks)))
        engine.destroy()
    return *found, (len(model._forward_hooks), len(model._forward_pre_hooks))


def test_off_it_leaves_no_hook(ranks):
    ((off, on, after),) = ranks(count_hooks, 1)
    assert on == (off[0] + 1, off[1] + 1) and after == (0, 0)
