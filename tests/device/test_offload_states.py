"""States leave the device between phases and come back: the memory is free, and training goes on to the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.device import simulated
from tests.device.training import batch, config, make, steps


def in_phases(settings: dict[str, Any], folder: str, *, moving: bool) -> tuple[Any, ...]:
    engine = make(settings)
    losses = steps(engine, 2)
    before = simulated.memory()
    moved = engine.offload_states() if moving else 0
    freed = before - simulated.memory()
    with torch.no_grad():
        losses.append(engine(*batch(9, engine.comm.data.rank, engine.device)))
    streamed = dict(engine.stream_weights(dtype=torch.float32))
    engine.save_checkpoint(folder)
    losses += steps(engine, 1, first=2)  # which brings them back
    if moving:
        engine.offload_states()
        assert engine.reload_states() > 0 and engine.offload_states() > 0
        engine.load_checkpoint(folder)  # while they are away
    else:
        engine.load_checkpoint(folder)
    losses += steps(engine, 2, first=3)
    on_device = all(run.param.device == engine.device for run in engine.trainables.layout.runs)
    result = [float(loss) for loss in losses], engine.full_state_dict(), {n: t.cpu() for n, t in streamed.items()}
    engine.destroy()
    return moved, freed, on_device, result


def compared(settings: dict[str, Any], folder: str) -> list[Any]:
    return [in_phases(settings, f"{folder}/{moving}", moving=moving) for moving in (False, True)]


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_states_leave_and_come_back(ranks: Any, tmp_path: Any, stage: int, dtype: str) -> None:
    for (_, _, _, stayed), (moved, freed, on_device, went) in ranks(compared, 2, config(stage, dtype), str(tmp_path)):
        assert moved > 0 and freed >= moved and on_device
        assert went[0] == stayed[0]
        for there, here in zip(went[1:], stayed[1:], strict=True):
            assert all(torch.equal(there[name], here[name]) for name in here) and there.keys() == here.keys()
