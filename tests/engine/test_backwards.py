"""Where gradients come from, and what discards them."""

from __future__ import annotations

import pytest
import torch

from tests.engine.cases import SGD, sgd_by_hand, train
from tests.harness import Setup, assert_close, seeded, start
from tests.models import Mlp, mse, regression


def discard(config):
    """What is discarded leaves neither gradients nor momentum; by each of the three ways to say so."""
    engine = start(Mlp, config)
    for zero in (engine.zero_grad, engine.optimizer.zero_grad, lambda: engine.zero_grad(set_to_none=False)):
        engine.backward(100 * mse(engine, engine.module, regression(4, seed=9)))
        zero()
        grads = [p.grad is None or not p.grad.any() for p in engine.module.parameters()]
        assert all(grads)
    train(engine)
    state, norm = engine.full_state_dict(), engine.get_global_grad_norm()
    engine.destroy()
    return state, norm


@pytest.mark.parametrize(("world", "stage"), [(1, 1), (2, 0), (2, 3)])
def test_zero_grad_by_any_name(ranks, world, stage) -> None:
    for state, _ in ranks(discard, world, SGD.config(stage)):
        assert_close(state, sgd_by_hand([regression(4)]))


def discard_half(config):
    """The second of two micro-steps, after the first was discarded, ends the window and is its average."""
    engine = start(Mlp, config)
    engine.backward(100 * mse(engine, engine.module, regression(4, seed=9)))
    engine.step()
    engine.zero_grad()
    last = engine.is_gradient_accumulation_boundary()
    train(engine)
    result = last, engine.global_steps, engine.full_state_dict()
    engine.destroy()
    return result


def test_zero_grad_stays_where_the_window_is(ranks) -> None:
    for last, steps, state in ranks(discard_half, 2, Setup("fp32", "SGD", accumulation=2).config(2)):
        assert last and steps == 1
        assert_close(state, sgd_by_hand([regression(4)]))


def retained(config):
    engine = start(Mlp, config)
    loss = mse(engine, engine.module, regression(4))
    engine.backward(loss, retain_graph=True)
    engine.backward(loss)
    engine.step()
    norm = engine.get_global_grad_norm()
    engine.destroy()
    return norm


@pytest.mark.parametrize("stage", [1, 3])
def test_retain_graph_adds_the_gradient_again(ranks, stage) -> None:
    model = seeded(Mlp)
    (2 * mse(model, model, regression(4))).backward()
    expected = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
    for norm in ranks(retained, 2, SGD.config(stage)):
        assert norm == pytest.approx(float(expected), rel=1e-5)
