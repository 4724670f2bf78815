"""How much of a step is done for each bucket on a device: a norm, and below fp32 a copy that rounds the master."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from tests.device import simulated
from tests.device.training import batch, config, make

DEPTHS = (1, 3)


class Deep(nn.Module):
    """``depth`` blocks, each a bucket or more."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(depth))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return x.float().square().mean()


def step(settings: dict[str, Any], depth: int) -> tuple[int, dict[str, int]]:
    """How many buckets are trained, and what ran on the device in the step after the first ones."""
    engine = make(settings, lambda: Deep(depth))  # type: ignore[arg-type]
    for number in range(4):
        engine.backward(engine(batch(number, engine.comm.data.rank, engine.device)[0]))
        simulated.kernels()
        engine.step()
    found = simulated.kernels()
    buckets = sum(len(unit.trainable) for unit in engine.trainables.layout.units)
    engine.destroy()
    return buckets, found


def steps(settings: dict[str, Any]) -> list[tuple[int, dict[str, int]]]:
    return [step(settings, depth) for depth in DEPTHS]


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(("dtype", "copies"), [("fp32", 0), ("bf16", 1)])
def test_what_a_step_does_for_each_bucket(ranks: Any, dtype: str, copies: int, stage: int) -> None:
    (few, small), (many, large) = ranks(steps, 1, config(stage, dtype))[0]
    more = {name: large.get(name, 0) - small.get(name, 0) for name in large}
    # Here foreach is an operation for each tensor: AdamW counts its steps, up and down again where it has skipped.
    expected = {"aten::linalg_vector_norm.out": 1, "copy_": copies, "aten::add.out": 1, "aten::sub.out": 1}
    assert many > few
    assert {name: count for name, count in more.items() if count} == {
        name: count * (many - few) for name, count in expected.items() if count
    }
    assert large["aten::_fused_adamw_"] == 1
