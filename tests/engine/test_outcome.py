"""What is told of steps once their verdict is known."""

from __future__ import annotations

import pytest

from shardline.events import Notice, StepDone
from tests.harness import Setup, start
from tests.models import Mlp, mse, regression


def listen(config):
    engine = start(Mlp, config)
    events = []
    engine.events.subscribe(events.append)
    losses = []
    for seed in range(4):
        loss = mse(engine, engine.module, regression(4, seed=seed))
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    engine.backward(mse(engine, engine.module, regression(4)))
    engine.destroy()
    done = [(e.step, float(e.loss), e.lr, e.samples, e.loss_scale) for e in events if isinstance(e, StepDone)]
    return losses, done, [e.message for e in events if isinstance(e, Notice)]


def test_what_is_told_of_steps(ranks) -> None:
    setup = Setup("fp32", "SGD", accumulation=2)
    for losses, done, notices in ranks(listen, 2, setup.config(1)):
        means = [sum(losses[:2]) / 2, sum(losses[2:]) / 2]
        assert done == [(i + 1, pytest.approx(mean, rel=1e-6), [5e-2], 16, None) for i, mean in enumerate(means)]
        assert notices == ["destroy() discards the gradients of a backward, which no step has applied"]
