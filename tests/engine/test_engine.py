"""The engine's surface: calls in and out of order, what each of them promises, and that errors are sentences."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import shardline
from shardline.events import Notice, StepDone
from tests.harness import STAGES, Setup, assert_close, assert_identical, seeded, start
from tests.models import Mlp, mse, regression

SGD = Setup("fp32", "SGD")


def attempt(call, *args, **kwargs):
    """The type and text of what a call raises, or ``None``."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def is_sentence(said, kind, *words):
    if said is None or said[0] != kind:
        return False
    text, code = said[1].rsplit(None, 1)
    return text.endswith(".") and code.startswith("[SL") and all(word in text for word in words)


def train(engine, seed=0, steps=1):
    for _ in range(steps):
        engine.backward(mse(engine, engine.module, regression(4, seed=seed)))
        engine.step()


def sgd_by_hand(batches, setup=SGD):
    """The twin's weights after a step on each element of ``batches``, a list of micro-batches."""
    twin = setup.twin(seeded(Mlp))
    for batch in batches:
        twin.backward(mse(twin, twin.model, batch))
        twin.step()
    return twin.state()


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
        assert is_sentence(said["stranger"], "UsageError", "no parameter of this engine's model")
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


def weight_of_a_short_batch():
    class Five(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, i):
            return tuple(part[i] for part in regression(5))

    config = SGD.config(1) | {"data_loader": {"shuffle": False}}
    engine, _, loader, _ = shardline.initialize(model=seeded(Mlp), config=config, training_data=Five())
    said = []
    for x, y in loader:
        engine.backward(F.mse_loss(engine(x), y, reduction="sum"))
        said.append(attempt(engine.step, weight=float(len(x))))
    engine.destroy()
    return said


def test_sums_and_the_loaders_own_weights_do_not_mix(ranks) -> None:
    (said,) = ranks(weight_of_a_short_batch, 1)
    assert said[0] is None and is_sentence(said[1], "UsageError", '"weighting": "none"', "0.25")


def changed_in_a_window(config):
    engine = start(Mlp, config)
    engine.backward(mse(engine, engine.module, regression(4)))
    engine.module.head.bias.requires_grad_(False)
    said = attempt(engine.step)
    engine.destroy()
    return said


def test_freezing_inside_a_window_is_refused(ranks) -> None:
    for said in ranks(changed_in_a_window, 2, SGD.config(2)):
        assert is_sentence(said, "UsageError", "requires_grad", "window")


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


def scaled_already(config):
    engine = start(Mlp, config)
    for seed in range(2):
        back = engine.backward(mse(engine, engine.module, regression(4, seed=seed)) / 2, scale_wrt_gas=False)
        engine.step()
    state, shape = engine.full_state_dict(), (back.dim(), back.requires_grad)
    engine.destroy()
    return state, shape


def test_a_loss_that_is_divided_already(ranks) -> None:
    setup = Setup("fp32", "SGD", accumulation=2)
    twin = setup.twin(seeded(Mlp))
    for seed in range(2):
        twin.backward(mse(twin, twin.model, regression(4, seed=seed)))
    twin.step()
    for state, shape in ranks(scaled_already, 1, setup.config(1)):
        assert_close(state, twin.state())
        assert shape == (0, False)


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


# --- weights ----------------------------------------------------------------------------------------------------------


def change_without_write(config):
    engine = start(Mlp, config)

    def change():
        with engine.gathered_parameters(), torch.no_grad():
            engine.module.head.bias.add_(1.0)

    said = attempt(change)
    engine.destroy()
    return said


@pytest.mark.parametrize("stage", [*(stage for stage in (0, 1, 2)), 3])
def test_a_change_without_write_raises(ranks, stage) -> None:
    for said in ranks(change_without_write, 2, SGD.config(stage)):
        assert is_sentence(said, "UsageError", "'head.bias'", "write=True")


def change_small_without_write(config):
    """At stage 3 with the default threshold, small units rest whole; ranks change them differently."""
    engine = start(Mlp, config)

    def change():
        with engine.gathered_parameters(), torch.no_grad():
            engine.module.head.bias.fill_(float(dist.get_rank()))

    said = attempt(change)
    state = engine.full_state_dict()["head.bias"]
    here = engine.module.head.bias.detach().clone() if said is None else None
    engine.destroy()
    return said, state, here


def test_a_change_of_a_kept_unit_without_write_raises(ranks) -> None:
    config = Setup("fp32", "SGD", zero={"stage3_param_persistence_threshold": 10_000}).config(3)
    for said, _, _ in ranks(change_small_without_write, 2, config):
        assert is_sentence(said, "UsageError", "'head.bias'", "write=True")


def nothing_written(config):
    """Looking in between forward and backward, with the right to write but without doing so."""
    engine = start(Mlp, config)
    loss = mse(engine, engine.module, regression(4))
    with engine.gathered_parameters(write=True):
        engine.module.head.bias.sum().item()
    said = attempt(engine.backward, loss)
    engine.destroy()
    return said


@pytest.mark.parametrize(
    "stage",
    [1, 3],
)
def test_looking_with_write_between_forward_and_backward(ranks, stage) -> None:
    for said in ranks(nothing_written, 2, SGD.config(stage)):
        assert said is None


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


# --- an nn.Module -----------------------------------------------------------------------------------------------------


class Talkative(Mlp):
    greeting = "hello"

    @property
    def width(self):
        return self.head.in_features

    def greet(self, name):
        return f"{self.greeting}, {name}"


def as_a_module(config):
    engine = start(Talkative, config)
    facts = {
        "attribute": engine.greeting,
        "method": engine.greet("you"),
        "property": engine.width,
        "child": engine.blocks is engine.module.blocks,
        "missing": attempt(lambda: engine.no_such_thing),
        "module": isinstance(engine, nn.Module) and next(iter(engine.children())) is engine.module,
        "parameters": sum(1 for _ in engine.parameters()),
        "modes": [engine.eval().module.training, engine.train().module.blocks[0].training],
        "getters": (
            engine.train_batch_size(),
            engine.train_micro_batch_size_per_gpu(),
            engine.gradient_accumulation_steps(),
            engine.zero_optimization_stage(),
            engine.bfloat16_enabled(),
            engine.fp16_enabled(),
            engine.loss_scale,
            engine.get_lr(),
        ),
        "place": (engine.local_rank, engine.global_rank, engine.world_size, engine.device),
        "config": engine.config.get("zero_optimization", {}).get("stage"),
        "before": (engine.global_steps, engine.skipped_steps, engine.was_step_applied(), engine.get_global_grad_norm()),
    }
    engine.destroy()
    return facts


def test_the_engine_as_a_module(ranks) -> None:
    for rank, facts in enumerate(ranks(as_a_module, 2, Setup("bf16").config(3))):
        assert (facts["attribute"], facts["method"], facts["property"]) == ("hello", "hello, you", 32)
        assert facts["child"] and facts["module"] and facts["parameters"] == 18 and facts["modes"] == [False, True]
        assert facts["missing"][0] == "AttributeError" and "no_such_thing" in facts["missing"][1]
        assert facts["getters"] == (8, 4, 1, 3, True, False, 1.0, [1e-2])
        assert facts["place"] == (rank, rank, 2, torch.device("cpu")) and facts["config"] == 3
        assert facts["before"] == (0, 0, False, None)


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


def follow(config, decay, by_data, steps):
    """What is told of a frozen bf16 teacher that follows its student, and what a save of the module needs."""
    engine = start(Taught, config)
    events = []
    engine.events.subscribe(events.append)
    for seed in range(steps):
        engine.backward(mse(engine, engine.module, regression(4, seed=seed)))
        engine.step()
        with engine.gathered_parameters(write=True), torch.no_grad():
            model = engine.module
            for ours, theirs in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
                (ours.data if by_data else ours).mul_(decay).add_(theirs, alpha=1 - decay)
    engine.destroy()
    return [e.message for e in events if isinstance(e, Notice)]


class Taught(nn.Module):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Linear(32, 32), nn.Linear(32, 32).requires_grad_(False)

    def forward(self, x):
        x = x.to(self.student.weight.dtype)
        return self.student(x) + self.teacher(x)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_frozen_weight_that_rounding_holds_back_is_told_once(ranks, stage) -> None:
    bf16 = Setup("bf16", "SGD").config(stage)
    for by_data in (False, True):
        for (notice,) in ranks(follow, 2, bf16, 0.999, by_data, 55):
            assert "'teacher." in notice and "torch.bfloat16 rounds away" in notice and "module_dtypes" in notice
    assert ranks(follow, 2, bf16, 0.5, False, 55) == [[], []], "an average that moves"
    assert ranks(follow, 2, bf16, 0.999, False, 20) == [[], []], "too early to tell"
    fp32 = bf16 | {"data_types": {"module_dtypes": {"Linear": "fp32"}}}
    assert ranks(follow, 2, fp32, 0.999, False, 55) == [[], []], "what the notice advises"


def leave(config):
    """Ways in which an engine is copied, pickled, moved or wrapped; and its module, saved and loaded elsewhere."""
    engine = start(Mlp, config)
    said = {
        "deepcopy": attempt(copy.deepcopy, engine),
        "copy": attempt(copy.copy, engine),
        "pickle": attempt(pickle.dumps, engine),
        "save": attempt(torch.save, engine, io.BytesIO()),
        "ddp": attempt(nn.parallel.DistributedDataParallel, engine),
        "half": attempt(engine.half),
    }
    kinds = [type(p) for p in engine.parameters()]
    assert engine.to("cpu") is engine and engine.float() is engine and engine.to("cpu", torch.float32) is engine
    assert kinds == [type(p) for p in engine.parameters()]
    saved = io.BytesIO()
    with engine.gathered_parameters():
        torch.save(engine.module, saved)
        weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
        copied = copy.deepcopy(engine.module)
    again = io.BytesIO()
    torch.save(copied, again)
    names = b"shardline" in saved.getvalue(), b"shardline" in again.getvalue()
    loaded = []
    for file in (saved, again):
        file.seek(0)
        loaded.append(torch.load(file, weights_only=False))
    right = []
    for model in loaded:
        right.append(all(torch.equal(p, weights[name]) for name, p in model.named_parameters()))
        right.append(all(type(p) is nn.Parameter for p in model.parameters()))
        model(regression(4)[0]).sum().backward()
    train(engine)
    engine.destroy()
    return said, names, right


@pytest.mark.parametrize("stage", [0, 3])
def test_an_engine_is_neither_copied_nor_wrapped_and_its_module_is_saved_without_it(ranks, stage) -> None:
    for said, names, right in ranks(leave, 2, SGD.config(stage)):
        for way in ("deepcopy", "copy", "pickle", "save"):
            assert is_sentence(said[way], "UsageError", "an engine cannot be", "full_state_dict"), said[way]
        assert is_sentence(said["ddp"], "UsageError", "averages gradients itself"), said["ddp"]
        assert is_sentence(said["half"], "SealedError" if stage == 3 else "ModelError", "before shardline.initialize")
        assert names == (False, False) and right == [True] * 4


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
