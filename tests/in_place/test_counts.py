"""What a loop sends in place: as `initialize` does where it is told how many batches a window has."""

from __future__ import annotations

import pytest
import torch

import shardline
from tests.harness import STAGES, seeded, transitions
from tests.in_place.loops import config
from tests.models import Mlp, regression

MICRO = 3


def counted(stage, more, clips):
    model = seeded(Mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = shardline.shard(model, optimizer, config(stage, **more))
    x, y = regression(4)
    for _ in range(3):
        before = transitions(engine)[0]
        for _ in range(MICRO):
            (model(x) - y).square().mean().backward()
        if clips:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    counts = transitions(engine)[0] - before
    engine.destroy()
    return counts


@pytest.mark.parametrize(
    ("more", "at_0_and_1"), [({}, MICRO), ({"gradient_accumulation_steps": MICRO}, 1)], ids=["open", "told"]
)
def test_reductions_of_a_window(ranks, more, at_0_and_1):
    for stage in STAGES:
        for counts in ranks(counted, 2, stage, more, clips=stage in (1, 3)):
            units = {unit for _, unit in counts}
            assert {counts["reduce", unit] for unit in units} == {at_0_and_1 if stage < 2 else MICRO}
            if stage < 3:
                assert {counts["gather", unit] for unit in units} == {1}
            else:
                assert max(counts["gather", unit] for unit in units) <= 2 * MICRO
