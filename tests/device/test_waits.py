"""Where the host waits for the device: nowhere in a step of fp32 or bf16, and once in fp16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.device import simulated
from tests.device.training import batch, config, make


def count_waits(settings: dict[str, Any]) -> list[str]:
    """What made the host wait in two steps, once the engine has settled."""
    engine = make(settings)
    batches = [batch(number, engine.comm.data.rank, engine.device) for number in range(6)]
    for number, given in enumerate(batches):
        if number == 4:
            simulated.waits()
        engine.backward(engine(*given))
        engine.step()
    found = simulated.waits()
    engine.destroy()
    return found


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_does_not_wait(ranks: Any, dtype: str, world: int) -> None:
    for stage in range(4):
        for waits in ranks(count_waits, world, config(stage, dtype)):
            assert waits == [], f"stage {stage}"


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_that_is_looked_at_does_not_wait(ranks: Any, world: int, tmp_path: Path) -> None:
    sinks = {
        "run_log": {"dir": str(tmp_path)},
        "wall_clock_breakdown": True,
        "steps_per_print": 1,
        "comms_logger": {},
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path)},
    }
    for waits in ranks(count_waits, world, config(2, "bf16") | sinks):
        assert waits == []
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["event"] == "StepDone"]
    phases = [line["step"] for line in lines if line["event"] == "PhaseTimes"]
    assert steps == phases == [1, 2, 3, 4, 5, 6], "the last ones are told by destroy()"
    # Each time between two events of the simulated device is 1 ms.
    waited = [line["waited"] for line in lines if line["event"] == "StepDone"]
    assert waited == [[]] * 6 if world == 1 else max(waited[-1]) > 0


@pytest.mark.parametrize("optimizer", ["Lamb", "Lion", "SGD", "Adagrad"])
def test_optimizers_with_a_scaled_step_do_not_wait(ranks: Any, optimizer: str) -> None:
    assert ranks(count_waits, 1, config(2, "bf16", optimizer=optimizer)) == [[]]


@pytest.mark.parametrize("world", [1, 2])
def test_fp16_waits_once_for_the_verdict(ranks: Any, world: int) -> None:
    """The loss scale of the next step depends on it."""
    for waits in ranks(count_waits, world, config(2, "fp16")):
        assert len(waits) <= 2, waits  # one in each of the two steps
