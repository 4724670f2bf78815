"""Every stage, precision and place of the states on simulated devices: the CPU's numbers, and no race."""

from __future__ import annotations

from typing import Any

import pytest

from tests.device import simulated
from tests.device.training import config, train_all

CASES = {
    f"{dtype} stage {stage}{' offload' * offload}": config(stage, dtype, offload=offload)
    for dtype in ("fp32", "bf16", "fp16")
    for stage in range(4)
    for offload in (False, True)
} | {
    "bf16 stage 3 accumulation": config(3, "bf16", accumulation=2),
    "bf16 stage 1 offload accumulation": config(1, "bf16", offload=True, accumulation=2),
    "fp32 stage 2 accumulation": config(2, "fp32", accumulation=2),
    "bf16 stage 2 RMSprop": config(2, "bf16", optimizer="RMSprop"),
    "fp32 stage 3 Lamb": config(3, "fp32", optimizer="Lamb"),
    "fp32 stage 1 Lion": config(1, "fp32", optimizer="Lion"),
    "fp32 stage 3 SGD": config(3, "fp32", optimizer="SGD"),
}
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 1e-3}
"""On the losses: kernels for one device and the other round sums of low precision differently."""


def on_devices(cases: list[dict[str, Any]]) -> Any:
    return train_all(cases), simulated.races()


@pytest.mark.parametrize("world", [1, 2])
def test_numbers_are_the_cpus_and_no_race(ranks: Any, cpu_ranks: Any, world: int) -> None:
    cases = list(CASES.values())
    devices = ranks(on_devices, world, cases, timeout=110)
    expected = cpu_ranks(train_all, world, cases, timeout=110)
    for rank in range(world):
        found, races = devices[rank]
        assert races == []
        for name, (losses, total), (cpu_losses, cpu_total) in zip(CASES, found, expected[rank], strict=True):
            within = TOLERANCE[name.split()[0]]
            assert losses == pytest.approx(cpu_losses, abs=within), name
            assert total == pytest.approx(cpu_total, rel=within), name


@pytest.mark.parametrize("world", [1, 2])
def test_stages_agree_bit_by_bit(ranks: Any, world: int) -> None:
    for dtype in ("fp32", "bf16"):
        stages = ranks(train_all, world, [config(stage, dtype) for stage in range(4)])[0]
        assert [losses for losses, _ in stages] == [stages[0][0]] * 4, dtype
