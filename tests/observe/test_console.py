from __future__ import annotations

import logging

import pytest
import torch

from shardline.config import load_config
from shardline.events import Events, Notice, PhaseTimes, StepDone, StepSkipped
from shardline.observe import Console, Run

STEP = StepDone(
    step=1,
    loss=2.5,
    lr=[1e-3],
    grad_norm=0.987,
    loss_scale=None,
    samples=32,
    seconds=0.5,
    read_memory=lambda: 512_000_000,
)


@pytest.fixture
def said(caplog, monkeypatch):
    """What was logged, as (level, message)."""
    monkeypatch.setattr(logging.getLogger("shardline.progress"), "level", logging.NOTSET)
    logging.getLogger("shardline.progress").manager._clear_cache()
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


def attach(**config):
    config = load_config({"train_batch_size": 8, **config}, 1)
    events, console = Events(), Console.of(config)
    console.open(Run(config))
    events.subscribe(console.receive)
    return events, console


def done(step, **changes):
    values = {name: getattr(STEP, name) for name in StepDone.__slots__}
    return StepDone(**{**values, "step": step, **changes})


def test_quiet_by_default(said):
    events, _ = attach()
    for step in range(1, 101):
        events.emit(done(step))
        events.emit(PhaseTimes(step, {"forward": 1.0}))
    assert said() == []


def test_a_line_every_so_many_steps_with_the_rate_over_them(said):
    events, _ = attach(steps_per_print=2)
    for step, seconds in enumerate([1.0, 3.0, 0.5, 0.5, 9.0], start=1):
        events.emit(done(step, seconds=seconds))
    assert said() == [
        ("INFO", "step 2 | loss 2.5000 | lr 1.00e-03 | grad norm 0.987 | 16.0 samples/s | 512 MB"),
        ("INFO", "step 4 | loss 2.5000 | lr 1.00e-03 | grad norm 0.987 | 64.0 samples/s | 512 MB"),
    ]


def test_what_is_unknown_is_left_out_and_tensors_are_read(said):
    events, _ = attach(steps_per_print=1)
    events.emit(done(1, loss=None, grad_norm=0.5, loss_scale=65536.0, lr=[0.1, torch.tensor(0.2), 0.1], seconds=0.0))
    assert said() == [("INFO", "step 1 | lr 1.00e-01, 2.00e-01 | grad norm 0.5 | loss scale 65536 | 512 MB")]


def test_transfers_are_means_over_the_interval(said):
    events, _ = attach(steps_per_print=2, comms_logger={})
    for step in (1, 2):
        events.emit(done(step, sent={"gather": step * 1_000_000, "reduce": 4_000_000}, waited=(0.001 * step, 0.0)))
    assert said()[1:] == [
        ("INFO", "step 2 | gather 1.5 MB | reduce 4 MB | rank 0 waited 1.5 ms | rank 1 waited 0.0 ms")
    ]


def test_a_skipped_step_is_always_one_warning(said):
    events, _ = attach()
    events.emit(StepSkipped(7, "a gradient is inf or NaN", 65536.0, 32768.0))
    events.emit(StepSkipped(8, "a gradient is inf or NaN", None, None))
    assert said() == [
        ("WARNING", "step 7 skipped: a gradient is inf or NaN; loss scale 65536 -> 32768"),
        ("WARNING", "step 8 skipped: a gradient is inf or NaN"),
    ]


def test_notices_are_warnings(said):
    events, _ = attach()
    events.emit(Notice("these keys have no effect: overlap_comm"))
    assert said() == [("WARNING", "these keys have no effect: overlap_comm")]


def test_phase_times_are_means_over_the_interval(said):
    events, _ = attach(steps_per_print=2, wall_clock_breakdown=True)
    for step, forward in enumerate([0.010, 0.020, 0.001, 0.003], start=1):
        events.emit(PhaseTimes(step, {"forward": forward, "backward": 2 * forward}))
    assert said() == [
        ("INFO", "step 2 | forward 15.0 ms | backward 30.0 ms"),
        ("INFO", "step 4 | forward 2.0 ms | backward 4.0 ms"),
    ]


def test_phase_times_of_every_step_without_steps_per_print(said):
    events, _ = attach(wall_clock_breakdown=True)
    events.emit(PhaseTimes(1, {"step": 0.5}))
    assert said() == [("INFO", "step 1 | step 500.0 ms")]


def test_lines_are_seen_without_any_logging_configured():
    import subprocess
    import sys

    code = (
        "from tests.observe.test_console import STEP, attach\n"
        "events, _ = attach(steps_per_print=1)\n"
        "events.emit(STEP)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert result.stderr == "step 1 | loss 2.5000 | lr 1.00e-03 | grad norm 0.987 | 64.0 samples/s | 512 MB\n"
    assert result.stdout == ""
