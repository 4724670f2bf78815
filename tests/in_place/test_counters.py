"""What is counted and reported where a window is a sum: in place, and where the caller says that a window ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shardline
from shardline.events import StepDone
from tests.in_place.loops import config

WINDOWS = [1, 3, 2, 1]
"""Backwards of each window."""


def losses_of(model, window):
    """One loss after the other: each forward comes behind the backward before it."""
    return (model(torch.full((4, 3), float(window + micro))).mean() for micro in range(WINDOWS[window]))


def in_place(stage, expected):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    more = {"train_micro_batch_size_per_gpu": 4}
    if expected:
        more["gradient_accumulation_steps"] = expected
    engine = shardline.shard(model, optimizer, config(stage, **more))
    found = []
    for window in range(len(WINDOWS)):
        for loss in losses_of(model, window):
            loss.backward()
        optimizer.step()
        found.append((engine.global_steps, engine.micro_steps, engine.global_samples))
    assert engine.was_step_applied() and engine.skipped_steps == 0
    engine.destroy()
    return found


def by_boundary(stage, once):
    """``step()`` once a window or after every backward; the loss of the event is that which the loop saw."""
    engine, *_ = shardline.initialize(
        model=nn.Linear(3, 2),
        config=config(
            stage,
            train_micro_batch_size_per_gpu=4,
            gradient_accumulation_steps=3,
            optimizer={"type": "SGD", "params": {"lr": 0.1}},
        ),
    )
    found, seen, reported = [], [], []
    engine.events.subscribe(lambda event: reported.append(float(event.loss)) if isinstance(event, StepDone) else None)
    for window, count in enumerate(WINDOWS):
        total = 0.0
        for micro, loss in enumerate(losses_of(engine, window)):
            total += float(loss)
            last = micro + 1 == count
            engine.set_gradient_accumulation_boundary(last)
            engine.backward(loss)
            if last or not once:
                engine.step()
        seen.append(total / count)
        found.append((engine.global_steps, engine.micro_steps, engine.global_samples))
    engine.destroy()
    torch.testing.assert_close(reported, seen, rtol=1e-5, atol=1e-6)
    return found


def counted():
    ways = [in_place(stage, expected) for stage in (0, 3) for expected in (None, 2)]
    return ways + [by_boundary(stage, once) for stage in (0, 3) for once in (True, False)]


@pytest.mark.parametrize("world", [1, 2])
def test_every_backward_of_a_window_is_counted(ranks, world):
    micro = [sum(WINDOWS[: n + 1]) for n in range(len(WINDOWS))]
    wanted = [(n + 1, count, 4 * world * count) for n, count in enumerate(micro)]
    for found in ranks(counted, world):
        for number, way in enumerate(found):
            assert way == wanted, number


class Own(shardline.Engine):
    """A client's class."""


def of_a_class():
    engine, *_ = shardline.initialize(model=nn.Linear(3, 2), config=config(3), engine_class=Own)
    assert isinstance(engine, Own) and type(engine) is Own and type(engine.module) is nn.Linear
    engine.destroy()


def test_the_class_of_the_engine_is_the_clients(ranks):
    ranks(of_a_class, 1)
