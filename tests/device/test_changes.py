"""What is trained changes during training: state moves along, and counts where the fused step expects it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.device import simulated
from tests.device.training import Net, config, make, steps


def freeze_inside_a_block(stage: int) -> Any:
    engine = make(config(stage))
    weight = engine.module.blocks[1].up.weight
    losses = steps(engine, 2)
    weight.requires_grad_(False)
    losses += steps(engine, 2, 2)
    weight.requires_grad_(True)
    losses += steps(engine, 2, 4)
    engine.destroy()
    return [float(loss) for loss in losses], simulated.races()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_freezing_inside_a_block(ranks: Any, stage: int) -> None:
    """The runs are cut elsewhere afterwards, so ranks take over states of parameters that they held nothing of."""
    for losses, races in ranks(freeze_inside_a_block, 2, stage):
        assert len(losses) == 6 and all(loss == loss for loss in losses)
        assert races == []


def unfreeze_after_a_load(stage: int, folder: str) -> Any:
    """A parameter that was trained is frozen, saved, loaded elsewhere while frozen, and trained on."""
    engine = make(config(stage, "fp32"))
    steps(engine, 2)
    engine.module.tokens.weight.requires_grad_(False)
    steps(engine, 1, 2)
    engine.save_checkpoint(folder)
    engine.module.tokens.weight.requires_grad_(True)
    expected = [float(loss) for loss in steps(engine, 2, 3)]
    engine.destroy()
    torch.manual_seed(0)
    net = Net()
    net.tokens.weight.requires_grad_(False)
    settings = config(stage, "fp32")
    params = settings.pop("optimizer")["params"]
    import shardline

    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.0, fused=True, **params)
    engine = shardline.initialize(model=net, optimizer=optimizer, config=settings)[0]
    engine.load_checkpoint(folder)
    net.tokens.weight.requires_grad_(True)
    found = [float(loss) for loss in steps(engine, 2, 3)]
    engine.destroy()
    return found, expected


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_state_that_was_frozen_in_a_checkpoint(ranks: Any, tmp_path: Any, world: int, stage: int) -> None:
    for found, expected in ranks(unfreeze_after_a_load, world, stage, str(tmp_path)):
        assert found == expected
