"""Stale: no forward ever sees weights of an older step, and no backward mixes two steps' weights."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.harness import STAGES, Setup, assert_close, seeded, spread, start
from tests.models import Mlp, TinyGpt, cross_entropy, mse, regression, tokens

MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}

HELD_OUT = regression(4, seed=99)


def evaluate(call, module, mode):
    was = module.training
    module.eval()
    with MODES[mode]():
        loss = mse(call, module, HELD_OUT).item()
    module.train(was)
    return loss


def with_evaluations(batches, config, mode):
    """Evaluate as the very first thing, between forward and backward, between backward and step, and after step."""
    rank = dist.get_rank()
    engine = start(Mlp, config)
    seen = [evaluate(engine, engine.module, mode)]
    for window in batches:
        for micro in window:
            loss = mse(engine, engine.module, micro[rank])
            seen.append(evaluate(engine, engine.module, mode))
            engine.backward(loss)
            seen.append(evaluate(engine, engine.module, mode))
            engine.step()
            seen.append(evaluate(engine, engine.module, mode))
    state = engine.full_state_dict()
    engine.destroy()
    return seen, state


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("world", "dtype"), [(2, "fp32"), (2, "bf16"), (1, "fp32")])
def test_evaluations_see_the_weights_of_now(ranks, stage, mode, world, dtype):
    setup = Setup(dtype, accumulation=2)
    batches = spread(regression, 2, setup, world)
    twin = setup.twin(seeded(Mlp))
    before = twin.state()
    expected = [evaluate(twin, twin.model, mode)]
    for window in batches:
        for last, micro in zip((False, True), window, strict=True):
            for batch in micro:
                twin.backward(mse(twin, twin.model, batch))
            expected += 2 * [evaluate(twin, twin.model, mode)]
            if last:
                twin.step()
            expected.append(evaluate(twin, twin.model, mode))
    assert len(set(expected)) == 3  # the steps show
    tolerance = {"fp32": 1e-5, "bf16": 5e-3}[dtype]
    for seen, state in ranks(with_evaluations, world, batches, setup.config(stage), mode):
        torch.testing.assert_close(seen, expected, rtol=tolerance, atol=0)
        assert_close(state, twin.state(), dtype, before)


@pytest.mark.parametrize("stage", [2, 3])
def test_kept_whole_between_forward_and_backward(ranks, stage):
    """`reshard_after_forward: false` keeps gathered weights longest, so it is where an old one would survive."""
    setup = Setup("bf16", zero={"reshard_after_forward": False})
    batches = spread(regression, 2, setup, 2)
    twin = setup.twin(seeded(Mlp))
    expected = [evaluate(twin, twin.model, "inference_mode")]
    for window in batches:
        for batch in window[0]:
            twin.backward(mse(twin, twin.model, batch))
        expected += 2 * [evaluate(twin, twin.model, "inference_mode")]
        twin.step()
        expected.append(evaluate(twin, twin.model, "inference_mode"))
    for seen, _ in ranks(with_evaluations, 2, batches, setup.config(stage), "inference_mode"):
        torch.testing.assert_close(seen, expected, rtol=5e-3, atol=0)


def step_before_backward(build, loss_of, batches, config):
    """forward, [forward, backward,] step, backward: the last meets weights that its forward did not have."""
    rank = dist.get_rank()
    engine = start(build, config)
    old = loss_of(engine, engine.module, batches[0][0][rank])
    engine.backward(loss_of(engine, engine.module, batches[1][0][rank]))
    engine.step()
    try:
        engine.backward(old)
    except RuntimeError as error:
        raised = str(error)
    else:
        raised = None
    engine.destroy()
    return raised


@pytest.mark.parametrize(
    ("build", "loss_of", "make"), [(Mlp, mse, regression), (TinyGpt, cross_entropy, tokens)], ids=["mlp", "gpt"]
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 2])
def test_backward_through_an_updated_model_raises(ranks, build, loss_of, make, dtype, stage, world):
    setup = Setup(dtype)
    batches = spread(make, 2, setup, world)
    for raised in ranks(step_before_backward, world, build, loss_of, batches, setup.config(stage)):
        assert raised is not None, "a backward through weights of two different steps went unnoticed"
        assert raised


def test_plain_pytorch_raises_too():
    """What the engine is held to."""
    model = seeded(Mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    old, new = mse(model, model, regression(4)), mse(model, model, regression(4, seed=1))
    new.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()
