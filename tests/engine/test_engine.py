"""The engine's surface: calls in and out of order, what each of them promises, and that errors are sentences."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tests.engine.cases import SGD, attempt, is_sentence, sgd_by_hand, train
from tests.harness import STAGES, Setup, assert_close, assert_identical, seeded, start
from tests.models import Mlp, mse, regression

# --- out of order -----------------------------------------------------------------------------------------------------


def out_of_order(config):
    engine = start(Mlp, config)
    x, y = regression(4)
    said = {
        "optimizer.step": attempt(engine.optimizer.step),
        "vector": attempt(lambda: engine.backward(F.mse_loss(engine(x), y, reduction="none"))),
        "number": attempt(engine.backward, 3.0),
        "no grad": attempt(engine.backward, torch.tensor(1.0)),
        "inside": attempt(step_inside, engine),
        "unknown": attempt(lambda: engine.gathered_parameters(["no.such"]).__enter__()),
        "stranger": attempt(lambda: engine.gathered_parameters([nn.Parameter(x)]).__enter__()),
    }
    with engine.no_sync():
        train(engine)
    right = engine.full_state_dict()
    engine.destroy()
    return said, right


def step_inside(engine):
    with engine.gathered_parameters():
        engine.step()


@pytest.mark.parametrize("stage", [0, 3])
def test_calls_out_of_order_are_sentences_and_do_no_harm(ranks, stage) -> None:
    for said, right in ranks(out_of_order, 2, SGD.config(stage)):
        assert is_sentence(said["optimizer.step"], "UsageError", "engine.step()")
        assert is_sentence(said["vector"], "UsageError", "(4, 32)", "scalar")
        assert is_sentence(said["number"], "UsageError", "float")
        assert is_sentence(said["no grad"], "UsageError", "does not require grad")
        assert is_sentence(said["inside"], "UsageError", "gathered_parameters")
        assert is_sentence(said["unknown"], "UsageError", "'no.such'", "blocks.0.up.weight")
        assert is_sentence(said["stranger"], "UsageError", "not a parameter of this engine's model")
        assert_close(right, sgd_by_hand([regression(4)]))


def step_without_backward(config, first):
    engine = start(Mlp, config)
    if first:
        train(engine)
    before = engine.full_state_dict()
    said = attempt(engine.step)
    unchanged = all(torch.equal(value, before[name]) for name, value in engine.full_state_dict().items())
    train(engine)
    right = engine.full_state_dict()
    engine.destroy()
    return said, unchanged, right


@pytest.mark.parametrize(
    ("world", "stage"),
    [(1, 1), (2, 1), (2, 3)],
)
@pytest.mark.parametrize("first", [False, True])
def test_a_step_without_a_backward_is_refused(ranks, world, stage, first) -> None:
    """Momentum and weight decay would move the weights; and the step after it is as if it had not been called."""
    for said, unchanged, right in ranks(step_without_backward, world, SGD.config(stage), first):
        assert is_sentence(said, "UsageError", "backward") and unchanged
        assert_close(right, sgd_by_hand([regression(4)] * (2 if first else 1)))


def weigh(config, weights):
    engine = start(Mlp, config)
    before = engine.full_state_dict()
    rank = dist.get_rank()
    x, y = regression(4, seed=rank)
    said = None
    for weight in weights:
        engine.backward(F.mse_loss(engine(x).float(), y, reduction="sum") / y.shape[1])
        said = said or attempt(engine.step, weight=weight)
    finite = all(bool(torch.isfinite(value).all()) for value in engine.full_state_dict().values())
    state = engine.full_state_dict()
    applied, norm = engine.was_step_applied(), engine.get_global_grad_norm()
    engine.destroy()
    moved = any(not torch.equal(value, before[name]) for name, value in state.items())
    return said, finite, moved, applied, norm


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_window_that_weighs_nothing_is_skipped(ranks, dtype) -> None:
    """All tokens of a global batch are padding."""
    for _, finite, moved, applied, _ in ranks(weigh, 2, Setup(dtype, "SGD").config(1), [0.0]):
        assert finite and not moved and not applied


def test_sums_over_weights_are_means(ranks) -> None:
    """Two ranks of 4 samples each: the sum over 8 divided by 8 is the mean of both."""
    setup = SGD
    twin = setup.twin(seeded(Mlp))
    for seed in range(2):
        twin.backward(mse(twin, twin.model, regression(4, seed=seed)))
    twin.step()
    for said, finite, moved, applied, norm in ranks(weigh, 2, setup.config(2), [4.0]):
        assert said is None and finite and moved and applied
        assert norm == pytest.approx(twin.norm, rel=1e-5)


# --- windows ----------------------------------------------------------------------------------------------------------


def incomplete(config):
    """Three of four micro-steps, then `boundary=True`; then a full window."""
    engine = start(Mlp, config)
    told = []
    for k, ends in enumerate([None, None, True, None, None, None, None]):
        told.append(engine.is_gradient_accumulation_boundary())
        engine.backward(mse(engine, engine.module, regression(4, seed=k)))
        engine.step(boundary=ends)
    result = told, engine.global_steps, engine.micro_steps, engine.full_state_dict()
    engine.destroy()
    return result


@pytest.mark.parametrize("stage", STAGES)
def test_an_incomplete_window_ends_where_one_says(ranks, stage) -> None:
    """It is the sum of its three micro-steps, each over four."""
    setup = Setup("fp32", "SGD", accumulation=4)
    twin = setup.twin(seeded(Mlp))
    for window in (range(3), range(3, 7)):
        for seed in window:
            for _ in range(2):
                twin.backward(mse(twin, twin.model, regression(4, seed=seed)), count=4 / len(window))
        twin.step()
    for told, steps, micro, state in ranks(incomplete, 2, setup.config(stage)):
        assert told == [False] * 6 + [True] and (steps, micro) == (2, 7)
        assert_close(state, twin.state())


# --- hooks before and after a step ------------------------------------------------------------------------------------


def with_hooks(config):
    engine = start(Mlp, config)
    log = []
    first = engine.before_step(lambda fragments: log.append(("before", sum(f.grad.numel() for f in fragments))))
    engine.after_step(lambda fragments: log.append(("after", all(f.grad is None for f in fragments))))
    train(engine)
    first.remove()
    first.remove()
    train(engine)
    engine.destroy()
    return log


def test_hooks_come_in_order_and_go(ranks) -> None:
    logs = ranks(with_hooks, 2, SGD.config(2))
    assert [[name for name, _ in log] for log in logs] == [["before", "after", "after"]] * 2
    assert sum(log[0][1] for log in logs) == sum(p.numel() for p in Mlp().parameters())
    assert all(value for log in logs for name, value in log if name == "after")


# --- destroy ----------------------------------------------------------------------------------------------------------


class Marked(nn.Parameter):
    """A subclass of Parameter, as libraries use to mark weights."""


def marked():
    model = Mlp()
    model.head.weight = Marked(model.head.weight.detach())
    model.blocks[0].up.weight.tag = "kept"
    model.blocks[1].requires_grad_(False)
    return model


def destroy(config):
    engine = start(marked, config)
    model = engine.module
    train(engine)
    expected = engine.full_state_dict()
    optimizer = engine.optimizer
    engine.destroy()
    twice = attempt(engine.destroy)
    facts = {
        "kinds": [type(p).__name__ for p in model.parameters()],
        "alone": all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in model.parameters()),
        "grads": [p.grad is None for p in model.parameters()],
        "frozen": [name for name, p in model.named_parameters() if not p.requires_grad],
        "tag": model.blocks[0].up.weight.tag,
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "own step": "step" not in vars(optimizer) and "zero_grad" not in vars(optimizer),
        "copy": torch.equal(copy.deepcopy(model).head.weight, model.head.weight),
    }
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plain = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    mse(model, model, regression(4)).backward()
    plain.step()
    moved = not torch.equal(model.head.weight.detach(), state["head.weight"])
    return facts, state, expected, moved, twice


@pytest.mark.parametrize(("world", "stage"), [(1, 1), (2, 0), (2, 2), (2, 3)])
def test_destroy_gives_ordinary_parameters_back(ranks, world, stage) -> None:
    for facts, state, expected, moved, twice in ranks(destroy, world, SGD.config(stage)):
        assert facts["kinds"] == ["Parameter"] * 16 + ["Marked", "Parameter"]
        assert facts["alone"] and all(facts["grads"]) and facts["tag"] == "kept"
        assert facts["frozen"] == [f"blocks.1.{part}.{kind}" for part in ("up", "down") for kind in ("weight", "bias")]
        assert facts["hooks"] == 0 and facts["own step"] and facts["copy"]
        assert_identical(state, expected)
        assert moved and twice is None


def use_after_destroy(config):
    engine = start(Mlp, config)
    x, y = regression(4)
    train(engine)
    engine.destroy()
    said = {"backward": attempt(lambda: engine.backward(F.mse_loss(engine(x), y)))}
    said["step"] = attempt(engine.step)
    said["full_state_dict"] = attempt(engine.full_state_dict)
    return said


@pytest.mark.parametrize(("world", "stage"), [(1, 1), (2, 3)])
def test_a_destroyed_engine_says_so(ranks, world, stage) -> None:
    for said in ranks(use_after_destroy, world, SGD.config(stage)):
        assert all(is_sentence(each, "UsageError", "destroy") for each in said.values()), said


def destroy_in_a_window(config):
    """With gradients accumulated, a forward done and units gathered."""
    engine = start(Mlp, config)
    before = engine.full_state_dict()
    engine.backward(mse(engine, engine.module, regression(4)))
    engine.step()
    loss = mse(engine, engine.module, regression(4))
    engine.destroy()
    same = all(torch.equal(value, before[name]) for name, value in engine.module.state_dict().items())
    return same, all(p.grad is None for p in engine.module.parameters()), float(loss.detach()) > 0


@pytest.mark.parametrize("stage", [1, 3])
def test_destroy_discards_a_window(ranks, stage) -> None:
    assert ranks(destroy_in_a_window, 2, Setup("fp32", "SGD", accumulation=2).config(stage)) == [(True, True, True)] * 2
