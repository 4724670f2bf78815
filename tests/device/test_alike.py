"""What must be the same on all ranks, on a device: no option there is waited for, and a difference is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import shardline
from tests.device import simulated
from tests.device.training import batch, config, make, steps


def rate_on_the_device(stage: int) -> Any:
    """A learning rate that is a tensor, alike for three steps; then another on rank 1; what is said, and when."""

    def adamw(params: Any) -> torch.optim.Optimizer:
        rate = torch.tensor(1e-2, device=f"cuda:{torch.accelerator.current_device_index()}")
        return torch.optim.AdamW(params, lr=rate, capturable=True, fused=True)

    settings = config(stage)
    del settings["optimizer"]
    engine = make(settings, optimizer=adamw)
    (group,) = engine.optimizer.param_groups
    steps(engine, 1)
    batches = [batch(number, engine.comm.data.rank, engine.device) for number in (1, 2)]
    with simulated.no_wait():
        for each in batches:
            engine.backward(engine(*each))
            engine.step()
    before = engine.full_state_dict()
    with torch.no_grad():
        group["lr"].mul_(1 + engine.comm.data.rank)
    steps(engine, 1, 3)
    with torch.no_grad():  # a scheduler goes on: what is named is what that step would have used
        group["lr"].fill_(5.0)
    said = None
    try:
        steps(engine, 1, 4)
    except shardline.errors.DisagreementError as error:
        said = str(error)
    after = engine.full_state_dict()
    same = all(torch.equal(value, before[name]) for name, value in after.items() if name != "seen")
    engine.destroy()
    return said, same, simulated.races()


@pytest.mark.parametrize("stage", [0, 3])
def test_a_rate_on_the_device_is_compared_there(ranks: Any, stage: int) -> None:
    for said, same, races in ranks(rate_on_the_device, 2, stage):
        assert said is not None and "the step before was not applied" in said
        assert "lr of param group 0 is 0.009999999776482582 on rank 0, 0.019999999552965164 on rank 1" in said
        assert same, "the device applied a step that ranks refused"
        assert races == []
