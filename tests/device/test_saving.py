"""Saves in the background: the host waits for no copy, and nothing is overwritten before it is copied."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from shardline.checkpoint.engine.staging import Staging
from shardline.errors import CheckpointError
from tests.device import simulated
from tests.device.training import batch, config, make, steps


def state_of(engine: Any) -> list[torch.Tensor]:
    """Copies of what a checkpoint holds."""
    states = [engine.optimizer.state[run.param] for run in engine.trainables.layout.runs]
    values = [value for state in states for _, value in sorted(state.items())] + [engine.module.seen]
    return [value.detach().cpu().clone() for value in values] + list(engine.full_state_dict().values())


def save_and_train(settings: dict[str, Any], folder: str, planted: bool = False) -> Any:
    """A step while a save in the background has not even looked whether its copies are there."""
    engine = make(settings)
    steps(engine, 2)
    expected, given = state_of(engine), [batch(9, engine.comm.data.rank, engine.device)] * 2
    gate, finish = threading.Event(), Staging.finish

    def late(self: Staging) -> None:
        assert gate.wait(30)
        finish(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Staging, "finish", late)
        if planted:
            patch.setattr(Staging, "before_step", lambda self: None)
        gate.set()
        engine.save_checkpoint(folder, tag="first", async_save=True)
        engine.checkpoints.wait()
        gate.clear()
        engine.save_checkpoint(folder, tag="again", async_save=True)  # into memory that is there
        simulated.races()
        for inputs in given:
            with simulated.no_wait():
                loss = engine(*inputs)
                engine.backward(loss)
                engine.step()
        with torch.no_grad(), engine.gathered_parameters(write=True):
            engine.module.head.weight.mul_(0.5)
        engine.module.seen.zero_()
        gate.set()
        engine.checkpoints.wait()
    races = simulated.races()
    engine.load_checkpoint(folder, "again")
    same = all(map(torch.equal, expected, state_of(engine)))
    engine.destroy()
    return same, races


@pytest.mark.parametrize("settings", [config(0), config(1), config(3), config(3, "fp32")], ids=str)
def test_a_step_goes_on_while_its_state_is_copied(ranks: Any, tmp_path: Any, settings: dict[str, Any]) -> None:
    assert ranks(save_and_train, 2, settings, str(tmp_path)) == [(True, [])] * 2


def test_a_step_that_does_not_wait_shows(ranks: Any, tmp_path: Any) -> None:
    for _, races in ranks(save_and_train, 2, config(1), str(tmp_path), planted=True):
        assert races


def edit_meanwhile(folder: str) -> tuple[str, str]:
    """What a save says where the state was changed before a step, and how it ends where nothing was."""
    engine = make(config(1))
    steps(engine, 2)
    gate, finish, said = threading.Event(), Staging.finish, []

    def late(self: Staging) -> None:
        assert gate.wait(30)
        finish(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Staging, "finish", late)
        for edited in (True, False):
            gate.clear()
            engine.save_checkpoint(folder, tag=f"edited {edited}".replace(" ", "-"), async_save=True)
            for state in engine.optimizer.state.values() if edited else ():
                state["exp_avg"].zero_()
            steps(engine, 1)
            gate.set()
            try:
                engine.checkpoints.wait()
                said.append("")
            except CheckpointError as error:
                said.append(str(error))
    engine.destroy()
    return said[0], said[1]


def test_an_edit_of_the_state_before_a_step_is_an_error(ranks: Any, tmp_path: Any) -> None:
    for first, second in ranks(edit_meanwhile, 2, str(tmp_path)):
        assert "'state.exp_avg/" in first and "was changed while it was copied" in first
        assert second == ""
