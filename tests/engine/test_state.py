"""What a checkpoint sees of an engine."""

from __future__ import annotations

import gc
import weakref

import pytest

from shardline.checkpoint.engine.checkpointer import Trainer
from shardline.engine.state import EngineState
from tests.engine.cases import SGD, train
from tests.harness import start
from tests.models import Mlp, mse, regression


def trained(config):
    """Counters inside a window, what is forgotten when another state is loaded, and what holds a destroyed engine."""
    engine = start(Mlp, config)
    state = engine.checkpoints._trainer
    assert isinstance(state, EngineState)
    trainer: Trainer = state
    train(engine, steps=4)
    before = trainer.checkpoint_counters(), trainer.in_window()
    engine.backward(mse(engine, engine.module, regression(4)))
    engine.step()
    inside = trainer.checkpoint_counters(), trainer.in_window()
    engine.client_state = {"best": 1}
    assert trainer.client_state is engine.client_state and trainer.lr_scheduler is engine.lr_scheduler
    trainer.client_state = {"best": 2}
    assert engine.client_state == {"best": 2}
    view = trainer.checkpoint_view()
    assert view.optimizer is engine.optimizer and view.units is engine.trainables.layout.units
    trainer.go_on_from({"global_steps": 7, "micro_steps": 14, "global_samples": 3, "skipped_steps": 0})
    after = trainer.checkpoint_counters(), trainer.in_window()
    del trainer, state, view
    engine.destroy()
    held = weakref.ref(engine)
    gc.disable()
    try:
        del engine
        freed = held() is None
    finally:
        gc.enable()
    return before, inside, after, freed


@pytest.mark.parametrize("stage", [0, 3])
def test_counters_are_those_of_the_windows_start(ranks, stage) -> None:
    config = SGD.config(stage) | {"gradient_accumulation_steps": 2}
    for before, inside, after, freed in ranks(trained, 2, config):
        assert before[0]["global_steps"] == 2 and before[0]["micro_steps"] == 4 and not before[1]
        assert inside == (before[0], True)
        assert after == (
            {"global_steps": 7, "micro_steps": 14, "global_samples": 3, "skipped_steps": 0, "average_updates": 0},
            False,
        )
        assert freed, "a destroyed engine goes with its last reference"
