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


class Odd(nn.Module):
    """Layers of a size that rounding up to a power of two makes 1.8 times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(272, 272, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.float().square().mean()


def page_locked(settings: dict[str, Any], folder: str) -> list[int]:
    """Page-locked bytes while there is an engine, with a save in the background, and after both."""
    make(settings, Odd).destroy()
    gc.collect()  # what others left
    torch.accelerator.synchronize()
    before = simulated.page_locked()
    engine = make(settings, Odd)
    x = torch.randn(4, 272, device=engine.device)
    for _ in range(3):
        engine.backward(engine(x))
        engine.step()
    found = [simulated.page_locked() - before]
    if folder:
        engine.save_checkpoint(folder, async_save=True)
        engine.checkpoints.wait()
        found.append(simulated.page_locked() - before)
    engine.destroy()
    del engine
    gc.collect()
    torch.accelerator.synchronize()
    return [*found, simulated.page_locked() - before]


@pytest.mark.parametrize(("world", "dtype"), [(1, "bf16"), (2, "bf16"), (2, "fp32")])
def test_page_locked_memory_of_offload_is_what_is_needed(ranks: Any, world: int, dtype: str) -> None:
    """Masters, gradients that arrive as they stay, and what is on its way; torch's allocator rounds each up."""
    shard = 272 * 272 // world
    stays = 4 * LAYERS * shard * (1 if dtype == "bf16" and world == 1 else 2)
    travels = 2 * 3 * shard * (dtype == "bf16") * (2 if world == 1 else 1)
    for used, left in ranks(page_locked, world, config(2, dtype, offload=True), ""):
        assert stays <= used <= 1.05 * (stays + travels)
        assert left < 4096


def test_page_locked_memory_of_a_save_is_what_is_saved(ranks: Any, tmp_path: Any) -> None:
    needed = 3 * 4 * LAYERS * 272 * 272 // 2  # masters and two moments
    for _, used, left in ranks(page_locked, 2, config(2), str(tmp_path)):
        assert needed <= used <= 1.05 * needed
        assert left < 4096


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
