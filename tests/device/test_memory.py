"""Bytes of the device: at rest, at the peak, and after the engine."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.device import simulated
from tests.device.training import config, make, steps

LAYERS, WIDTH = 8, 256


class Deep(nn.Module):
    """Equal layers and next to no activations, so that what the engine keeps is nearly all there is."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.float().square().mean()


NUMEL = LAYERS * WIDTH * WIDTH


def bytes_per_parameter(settings: dict[str, Any]) -> tuple[float, float]:
    """At rest, between two steps, and at the peak of a step."""
    before = simulated.memory()
    engine = make(settings, Deep)
    x = torch.randn(4, WIDTH, device=engine.device)
    for step in range(3):
        if step == 2:
            simulated.reset_peak()
        engine.backward(engine(x))
        engine.step()
    found = (simulated.memory() - before) / NUMEL, (simulated.memory(peak=True) - before) / NUMEL
    engine.destroy()
    return found


@pytest.mark.parametrize(
    ("settings", "rest", "gradient"),
    [
        (config(2, "bf16"), 14, 4),  # weight 2, master 4, two moments 8; a gradient of 2 that is added up in fp32
        (config(2, "fp32"), 12, 4),
        (config(2, "bf16", offload=True), 2, 2),
    ],
    ids=["bf16", "fp32", "bf16 offload"],
)
def test_bytes_per_parameter(ranks: Any, settings: dict[str, Any], rest: int, gradient: int) -> None:
    """Of one rank: the formula at rest, and at the peak one gradient more and two layers under way."""
    [(at_rest, peak)] = ranks(bytes_per_parameter, 1, settings)
    layer = 4 / LAYERS
    assert rest <= at_rest <= rest + 0.2
    assert peak <= rest + gradient + 2 * layer


def left_after_destroy(settings: dict[str, Any]) -> tuple[int, int]:
    """Bytes that the engine used, and bytes that are left when it is gone, without the garbage collector."""
    make(settings).destroy()  # the first optimizer of a process imports torch._dynamo, whose frames stay in a cycle
    gc.collect()
    gc.disable()
    try:
        before = simulated.memory()
        engine = make(settings)
        steps(engine, 2)
        used = simulated.memory() - before
        engine.destroy()
        del engine
        return used, simulated.memory() - before
    finally:
        gc.enable()


@pytest.mark.parametrize("world", [1, 2])
def test_destroy_gives_everything_back(ranks: Any, world: int) -> None:
    for stage in (2, 3):
        for used, left in ranks(left_after_destroy, world, config(stage)):
            assert used > 0
            assert left == 0, f"stage {stage}"
