"""Gradients between backward and step: served where they are whole, an error that says what to call elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from tests.harness import Setup, assert_close, seeded, start
from tests.models import Mlp, mse, regression

SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


def held(engine):
    return [param for group in engine.optimizer.param_groups for param in group["params"]]


def read_all(params):
    return sum(float(param.grad.norm()) for param in params if param.grad is not None)


def forget(params):
    for param in params:
        param.grad = None


USES = {
    "clip_grad_norm_": lambda params: clip_grad_norm_(params, 0.1),
    "clip_grad_value_": lambda params: clip_grad_value_(params, 1e-3),
    "read": read_all,
}
CHANGES = {
    "assigned": lambda params: [setattr(param, "grad", torch.zeros_like(param)) for param in params],
    "forgotten": forget,
}


def attempt(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def backward(engine, seed=0):
    engine.backward(mse(engine, engine.module, regression(4, seed=seed)))


def refused(config):
    """What each use raises, in the middle of a window and at its end; the step is then as without it."""
    engine = start(Mlp, config)
    clean = all(param.grad is None for param in engine.parameters())
    said = {}
    for micro in range(2):
        backward(engine, micro)
        for name, use in USES.items():
            said[micro, name] = attempt(lambda use=use: use(list(engine.parameters())))
            said[micro, name, "optimizer"] = attempt(lambda use=use: use(held(engine)))
        for name, change in CHANGES.items():
            said[micro, name] = attempt(lambda change=change: change(list(engine.parameters())))
        said[micro, "zero_grad of the module"] = attempt(engine.module.zero_grad)
        engine.step()
    clean = clean and all(param.grad is None for param in (*engine.parameters(), *held(engine)))
    state = engine.full_state_dict()
    engine.destroy()
    return said, state, clean


def steps_by_hand(change=None, dtype=torch.float32):
    """Two micro-steps in plain torch, ``change`` before the step."""
    model = seeded(Mlp)
    for micro in range(2):
        (mse(model, model, regression(4, seed=micro)) / 2).backward()
    if change is not None:
        change(list(model.parameters()))
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return model.state_dict()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_not_whole_is_refused(ranks, stage) -> None:
    for said, state, clean in ranks(refused, 2, Setup(accumulation=2, more=SGD).config(stage)):
        for what, error in said.items():
            assert error is not None and error[0] == "UsageError", (what, error)
            assert "gradient_clipping" in error[1] and "before_step" in error[1]
        assert clean, "no gradient before the first backward, and none after the step"
        assert_close(state, steps_by_hand())


def scaled(config):
    """One rank: the gradient of fp16 is whole, and has the loss scale."""
    engine = start(Mlp, config)
    backward(engine)
    said = attempt(lambda: clip_grad_norm_(engine.parameters(), 1.0)), attempt(lambda: clip_grad_norm_(held(engine), 1))
    engine.destroy()
    return said


def test_a_gradient_with_a_loss_scale_is_refused(ranks) -> None:
    for said in ranks(scaled, 1, Setup("fp16").config(0)):
        assert all(error is not None and error[0] == "UsageError" for error in said)


def halve(params):
    for param in params:
        param.grad *= 0.5


def served(config, dtype):
    states = {}
    for name in ("clip_grad_norm_", "clip_grad_value_", "halve", "forgotten", "zero_grad of the module", "assigned"):
        for whose in ("module", "optimizer"):
            if whose == "optimizer" and (name not in USES or (name == "clip_grad_norm_" and dtype != "fp32")):
                continue
            engine = start(Mlp, config)
            for micro in range(2):
                backward(engine, micro)
                if not micro:
                    engine.step()
            params = list(engine.parameters()) if whose == "module" else held(engine)
            if name == "zero_grad of the module":
                engine.module.zero_grad()
            elif name == "assigned":
                for param in params:
                    param.grad = torch.full_like(param, 0.25)
            else:
                {**USES, "halve": halve, "forgotten": forget}[name](params)
            engine.step()
            states[name, whose] = engine.full_state_dict()
            engine.destroy()
    return states


def quarter(params):
    for param in params:
        param.grad = torch.full_like(param, 0.25)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_whole_gradient_is_served_and_changes_count(ranks, dtype) -> None:
    by_hand = {**USES, "halve": halve, "forgotten": forget, "zero_grad of the module": forget, "assigned": quarter}
    before = seeded(Mlp).state_dict()
    for stage in (0, 3):
        for states in ranks(served, 1, Setup(dtype, accumulation=2, more=SGD).config(stage), dtype):
            for (name, whose), state in states.items():
                expected = steps_by_hand(by_hand[name])
                if name == "clip_grad_value_" and dtype == "bf16":
                    continue  # a value near the limit may round to its other side
                try:
                    assert_close(state, expected, dtype, before)
                except AssertionError as error:
                    raise AssertionError(f"{name} on what the {whose} holds: {error}") from error


def hooks_of_the_user(config):
    """Hooks in the middle of backward see what autograd has just left, in each micro-step."""
    engine = start(Mlp, config)
    seen = []
    weight = engine.module.head.weight

    def hook(param):
        seen.append(float(param.grad.norm()))
        param.grad = param.grad * 2.0

    handle = weight.register_post_accumulate_grad_hook(hook)
    for micro in range(2):
        backward(engine, micro)
        engine.step()
    handle.remove()
    state = engine.full_state_dict()
    engine.destroy()
    return seen, state


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 1), (2, 3)])
def test_hooks_in_the_middle_of_a_backward(ranks, world, stage) -> None:
    model = seeded(Mlp)
    wanted = []
    for micro in range(2):
        (mse(model, model, regression(4, seed=micro)) / 2).backward()
        wanted.append(model.head.weight.grad.clone())
    norms = [float(wanted[0].norm()), float((wanted[1] - wanted[0]).norm())]
    model.head.weight.grad *= 2.0
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for seen, state in ranks(hooks_of_the_user, world, Setup(accumulation=2, more=SGD).config(stage)):
        assert seen == pytest.approx(norms, rel=1e-5)
        assert_close(state, model.state_dict())


def discarded(config):
    engine = start(Mlp, config)
    for zero in (engine.zero_grad, engine.optimizer.zero_grad):
        backward(engine)
        zero()
        if any(param.grad is not None for param in (*engine.parameters(), *held(engine))):
            return "a gradient is left"
    backward(engine)
    engine.destroy()
    return [param.grad for param in engine.module.parameters() if param.grad is not None]


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 3)])
def test_nothing_is_left_of_what_is_discarded(ranks, world, stage) -> None:
    assert ranks(discarded, world, Setup(more=SGD).config(stage)) == [[]] * world


def compiled_between(config):
    """A block that is compiled again, for another batch size, while gradients are collected."""
    torch._dynamo.reset()
    engine = start(Mlp, config)
    engine.compile(backend="eager", dynamic=False)
    for size in (4, 3):
        engine.backward(mse(engine, engine.module, regression(size, seed=size)))
        engine.step()
    steps = engine.global_steps
    engine.destroy()
    torch._dynamo.reset()
    return steps


def test_compiling_while_gradients_are_collected(ranks) -> None:
    assert ranks(compiled_between, 2, Setup(accumulation=2, more=SGD).config(0)) == [1, 1]
