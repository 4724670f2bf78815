"""Edits: what users do to a model between steps works as in plain PyTorch, or is refused with the parameter's name."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.harness import (
    OPTIMIZERS,
    STAGES,
    Setup,
    assert_close,
    assert_identical,
    assert_ranks_agree,
    seeded,
    spread,
    train,
)
from tests.models import ConvNet, Mlp, cross_entropy, images, mse, regression

STEPS = 8


def editable(engine, write=True):
    """Where a model may be edited: anywhere below stage 3, inside ``gathered_parameters`` at stage 3."""
    if engine.zero_optimization_stage() == 3:
        return engine.gathered_parameters(write=write)
    return contextlib.nullcontext()


# Each edit: edit(model, memory, step), called before each step's forward, on the engine's model and on the twin's.


def clamp(model, memory, step):
    if step in (2, 4):
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.1, 0.1)


def scale_one(model, memory, step):
    """A single parameter, by hand; its neighbours in the buffer keep their values."""
    if step == 3:
        with torch.no_grad():
            model.blocks[1].up.weight.mul_(0.5)


def load(model, memory, step):
    if step == 3:
        model.load_state_dict(seeded(Mlp, seed=7).state_dict())


def load_part(model, memory, step):
    if step == 3:
        model.load_state_dict({"head.bias": torch.full((32,), 0.25)}, strict=False)


def ema(model, memory, step):
    """Average; at steps 3 and 5 swap the average in, look, and swap it out again."""
    weights = dict(model.named_parameters())
    average = memory.setdefault("ema", {name: p.detach().clone() for name, p in weights.items()})
    with torch.no_grad():
        for name, p in weights.items():
            average[name].lerp_(p, 0.5)
        if step in (3, 5):
            kept = {name: p.detach().clone() for name, p in weights.items()}
            for name, p in weights.items():
                p.copy_(average[name])
            memory.setdefault("sums", []).append(sum(p.double().sum().item() for p in weights.values()))
            for name, p in weights.items():
                p.copy_(kept[name])


def stay_on_average(model, memory, step):
    """Swap the average in and train on from it."""
    weights = dict(model.named_parameters())
    average = memory.setdefault("ema", {name: p.detach().clone() for name, p in weights.items()})
    with torch.no_grad():
        for name, p in weights.items():
            average[name].lerp_(p, 0.5)
            if step == 4:
                p.copy_(average[name])


def by_data(model, memory, step):
    """Edits that raise no version: of what is read now, of what was read before, and by assignment."""
    weight = model.blocks[1].up.weight
    if step == 1:
        for p in model.parameters():
            p.data.clamp_(-0.15, 0.15)
    if step == 3:
        weight.data[:] = weight.data * 0.5
    if step == 5:
        model.head.weight.data = model.head.weight.data.flip(0).t()


IN_PLACE = {f.__name__: f for f in (clamp, scale_one, load, load_part, ema, stay_on_average, by_data)}


def train_with_edits(edit, batches, config):
    import shardline

    rank, memory = dist.get_rank(), {}
    engine, *_ = shardline.initialize(model=seeded(Mlp), config=config)
    for step, window in enumerate(batches):
        with editable(engine):
            IN_PLACE[edit](engine.module, memory, step)
        for micro in window:
            engine.backward(mse(engine, engine.module, micro[rank]))
            engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return state, memory.get("sums")


def twin_with_edits(edit, batches, setup):
    """The twin's masters follow its weights where, and only where, the edit changed them, element by element.

    So an average swapped in and out costs a bf16 model none of its masters' precision.
    """
    twin, memory = setup.twin(seeded(Mlp)), {}
    for step, window in enumerate(batches):
        was = {name: p.detach().clone() for name, p in twin.params.items()}
        IN_PLACE[edit](twin.model, memory, step)
        for name, p in twin.params.items():
            master = twin.master(name)
            master.copy_(torch.where(p.detach() == was[name], master, p.detach()))
        for micro in window:
            for batch in micro:
                twin.backward(mse(twin, twin.model, batch))
        twin.step()
    return twin, memory.get("sums")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("edit", IN_PLACE)
@pytest.mark.parametrize("stage", STAGES)
def test_in_place_edits_are_adopted(ranks, stage, edit, dtype):
    setup = Setup(dtype, "SGD")
    batches = spread(regression, STEPS, setup, 2)
    before = setup.twin(seeded(Mlp)).state()
    twin, sums = twin_with_edits(edit, batches, setup)
    results = ranks(train_with_edits, 2, edit, batches, setup.config(stage))
    assert_ranks_agree([state for state, _ in results])
    for state, seen in results:
        assert_close(state, twin.state(), dtype, before)
        if sums:
            assert seen == pytest.approx(sums, rel=1e-2 if dtype == "bf16" else 1e-4)


def data_swap(batches, config):
    """An average swapped in and out by `.data`, which raises no version: harmless, since nothing steps in between."""
    import shardline

    rank = dist.get_rank()
    engine, *_ = shardline.initialize(model=seeded(Mlp), config=config)
    for window in batches:
        with editable(engine):
            kept = [p.data.clone() for p in engine.module.parameters()]
            for p in engine.module.parameters():
                p.data.fill_(0.5)
            for p, value in zip(engine.module.parameters(), kept, strict=True):
                p.data.copy_(value)
        engine.backward(mse(engine, engine.module, window[0][rank]))
        engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return state


class Held(Mlp):
    """Its weights are edited in the forward, through ``.data``: a codebook, a spectral norm. Twice is as once."""

    def forward(self, x):
        self.blocks[1].up.weight.data.clamp_(-0.1, 0.1)
        self.head.weight.data = self.head.weight.data.clamp(-0.05, 0.05)
        return super().forward(x)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_edits_by_data_in_a_forward(ranks, dtype):
    setup = Setup(dtype, "SGD")
    batches = spread(regression, 4, setup, 2)
    twin = setup.twin(seeded(Held))
    before = twin.state()
    for window in batches:
        for batch in window[0]:
            was = {name: p.detach().clone() for name, p in twin.params.items()}
            twin.backward(mse(twin, twin.model, batch))
            for name, p in twin.params.items():
                twin.master(name).copy_(torch.where(p.detach() == was[name], twin.master(name), p.detach()))
        twin.step()
    for results in ranks(train, 2, Held, mse, batches, [setup.config(stage) for stage in STAGES]):
        for result in results:
            assert_close(result["state"], twin.state(), dtype, before)
            assert_identical(result["state"], results[0]["state"])


def swap(batches, config, swaps):
    """Train; with ``swaps`` evaluate other weights before each step, saved in between, and put the own ones back."""
    import shardline

    rank = dist.get_rank()
    engine, *_ = shardline.initialize(model=seeded(Mlp), config=config)
    seen = []
    for step, window in enumerate(batches):
        params = list(engine.module.parameters())
        with editable(engine) if swaps else contextlib.nullcontext():
            if swaps:
                kept = [p.detach().clone() for p in params]
                for p in params:
                    p.data.copy_(torch.zeros_like(p))
        if swaps:
            with torch.no_grad():
                seen.append(float(engine(window[0][rank][0]).abs().max()))
            if step % 2:
                seen += [float(value.abs().max()) for value in engine.full_state_dict().values()]
            with editable(engine), torch.no_grad():
                for p, value in zip(params, kept, strict=True):
                    if step % 3:
                        p.data.copy_(value)
                    else:
                        p.copy_(value)
        engine.backward(mse(engine, engine.module, window[0][rank]))
        engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return state, seen


@pytest.mark.parametrize("stage", STAGES)
def test_weights_swapped_out_and_in_leave_no_trace(ranks, stage):
    """bf16: the masters come back to the bit, though zeros were taken over, saved and evaluated in between."""
    setup = Setup("bf16", "AdamW")
    batches = spread(regression, 4, setup, 2)
    plain = ranks(swap, 2, batches, setup.config(stage), False)
    for (state, seen), (expected, _) in zip(ranks(swap, 2, batches, setup.config(stage), True), plain, strict=True):
        assert not any(seen) and len(seen) > 4
        assert_identical(state, expected)


class Teacher(nn.Module):
    """MoCo: the frozen key encoder follows the query encoder inside the forward, after that was used."""

    def __init__(self):
        super().__init__()
        self.query, self.key = (nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)) for _ in range(2))
        self.key.load_state_dict(self.query.state_dict())
        self.key.requires_grad_(False)

    def forward(self, x):
        query = self.query(x)
        with torch.no_grad():
            for ours, theirs in zip(self.key.parameters(), self.query.parameters(), strict=True):
                ours.mul_(0.5).add_(theirs, alpha=0.5)
        return query + self.key(x)


@pytest.mark.parametrize("zero", [{}, {"unit_min_numel": 100_000}], ids=["units", "one unit"])
def test_a_teacher_that_follows_in_the_forward(ranks, zero):
    """At stage 3 no weight of the student seems to have changed, though they share a unit."""
    setup = Setup("fp32", "SGD", zero=zero)
    batches = spread(regression, 3, setup, 1)
    twin = setup.twin(seeded(Teacher))
    for window in batches:
        twin.backward(mse(twin, twin.model, window[0][0]))
        twin.step()
    both = [[[window[0][0]] * 2] for window in batches]  # each rank the same: the teacher moves once a forward
    for results in ranks(train, 2, Teacher, mse, both, [setup.config(stage) for stage in STAGES]):
        for result in results:
            assert_close(result["state"], twin.state())


class Router(nn.Module):
    """Switch's: the classifier works in fp32, whatever the model does."""

    def __init__(self, again=False):
        super().__init__()
        self.inner, self.classifier, self.outer = (nn.Linear(32, 32) for _ in range(3))
        self.again = again

    def forward(self, x):
        scores = self.classifier.to(torch.float32)(self.inner(x).float())
        if self.again:
            scores = scores + self.classifier.to(torch.float32)(scores)
            self.classifier.to(x.dtype)
        return self.outer(scores.tanh().to(x.dtype))


class Again(Router):
    def __init__(self):
        super().__init__(again=True)


def converted(build, batches, configs):
    """The states, and whether every parameter is a view in its own dtype again outside of forward and backward."""
    import shardline

    rank, found = dist.get_rank(), []
    for config in configs:
        engine, *_ = shardline.initialize(model=seeded(build), config=config)
        whole = []
        for window in batches:
            loss = mse(engine, engine.module, window[0][rank])
            whole.append({p.dtype for p in engine.module.parameters()})
            engine.backward(loss)
            engine.step()
            whole.append({p.dtype for p in engine.module.parameters()})
        found.append((engine.full_state_dict(), whole))
        engine.destroy()
    return found


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("build", [Router, Again])
def test_a_parameter_converted_in_the_forward(ranks, build, recompute):
    setup = Setup("bf16", "SGD")
    batches = spread(regression, 3, setup, 2)
    twin = setup.twin(seeded(build))
    before = twin.state()
    for window in batches:
        for batch in window[0]:
            twin.backward(mse(twin, twin.model, batch))
            twin.model.to(torch.bfloat16)
        twin.step()
    make = Recomputed if recompute and build is Router else build
    for found in ranks(converted, 2, make, batches, [setup.config(stage) for stage in STAGES]):
        for state, dtypes in found:
            assert all(each == {torch.bfloat16} for each in dtypes)
            assert_identical(state, found[0][0])
            state = {name.removeprefix("inner_model."): value for name, value in state.items()}
            assert_close(state, twin.state(), "bf16", before)


class Recomputed(nn.Module):
    """The same in a block that runs again in the backward."""

    def __init__(self):
        super().__init__()
        self.inner_model = Router()

    def forward(self, x):
        return checkpoint(self.inner_model, x, use_reentrant=False)


@pytest.mark.parametrize("stage", STAGES)
def test_swap_by_data(ranks, stage):
    setup = Setup("bf16", "SGD")
    batches = spread(regression, 3, setup, 2)
    twin = setup.twin(seeded(Mlp))
    before = twin.state()
    for window in batches:
        for batch in window[0]:
            twin.backward(mse(twin, twin.model, batch))
        twin.step()
    for state in ranks(data_swap, 2, batches, setup.config(stage)):
        assert_close(state, twin.state(), "bf16", before)


# --- replaced tensors -------------------------------------------------------------------------------------------------

REPLACE = {
    "float": lambda model: model.float(),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "data": lambda model: setattr(model.conv2.weight, "data", model.conv2.weight.data.clone() * 2),
    "attribute": lambda model: setattr(model.conv2, "weight", torch.nn.Parameter(torch.zeros(10, 6, 3, 3))),
}


def replace_then_train(what, batches, config):
    """Per rank: the error, or the state after going on."""
    import shardline

    rank = dist.get_rank()
    engine, *_ = shardline.initialize(model=seeded(ConvNet), config=config)
    error = state = None
    try:
        for step, window in enumerate(batches):
            if step == 2:
                with editable(engine):
                    REPLACE[what](engine.module)
            engine.backward(cross_entropy(engine, engine.module, window[0][rank]))
            engine.step()
        state = engine.full_state_dict()
    except shardline.errors.ShardlineError as raised:
        error = str(raised)
    engine.destroy()
    return error, state


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("what", REPLACE)
def test_replaced_tensors(ranks, what, stage):
    """bf16. Refused by name, except where plain PyTorch would train on unharmed: and then so must the engine."""
    setup = Setup("bf16", "SGD")
    batches = spread(images, 4, setup, 2)
    results = ranks(replace_then_train, 2, what, batches, setup.config(stage))
    names = [name for name, _ in seeded(ConvNet).named_parameters()]
    before = setup.twin(seeded(ConvNet)).state()
    for error, state in results:
        if error is not None:
            assert any(name in error for name in names), error
            if what in ("data", "attribute"):
                assert "conv2.weight" in error
            continue
        twin = setup.twin(seeded(ConvNet))
        for step, window in enumerate(batches):
            if step == 2:
                assert what in ("channels_last", "data"), f"{what} went unnoticed"
                if what == "data":
                    twin.master("conv2.weight").mul_(2)
                    twin.publish()
            for batch in window[0]:
                twin.backward(cross_entropy(twin, twin.model, batch))
            twin.step()
        assert_close(state, twin.state(), "bf16", before)


def float_in_fp32(batches, config):
    import shardline

    rank = dist.get_rank()
    engine, *_ = shardline.initialize(model=seeded(Mlp), config=config)
    for window in batches:
        with editable(engine):
            engine.module.float()
        engine.backward(mse(engine, engine.module, window[0][rank]))
        engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return state


@pytest.mark.parametrize("stage", STAGES)
def test_float_of_an_fp32_model_changes_nothing(ranks, stage):
    setup = Setup()
    batches = spread(regression, 2, setup, 2)
    twin = setup.twin(seeded(Mlp))
    for window in batches:
        for batch in window[0]:
            twin.backward(mse(twin, twin.model, batch))
        twin.step()
    for state in ranks(float_in_fp32, 2, batches, setup.config(stage)):
        assert_close(state, twin.state())


# --- a model that is changed ------------------------------------------------------------------------------------------

SURGERY = {
    "head": lambda m: setattr(m, "head", nn.Linear(32, 32)),
    "adapter": lambda m: setattr(m, "head", nn.Sequential(m.head, nn.Linear(32, 32))),
    "block": lambda m: m.blocks.append(nn.Linear(32, 32)),
    "removed": lambda m: m.blocks.__delitem__(1),
    "tied": lambda m: setattr(m.head, "weight", m.blocks[0].up.weight),
}


def change_model(batches, config):
    """What each change, and each second use of the model's parameters, is answered with."""
    import shardline

    rank, said = dist.get_rank(), {}
    for what, change in SURGERY.items():
        engine, *_ = shardline.initialize(model=seeded(Mlp), config=config)
        engine.backward(mse(engine, engine.module, batches[0][0][rank]))
        engine.step()
        change(engine.module)
        for call in (
            lambda engine=engine: engine(batches[1][0][rank][0]),
            engine.full_state_dict,
            lambda engine=engine: engine.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
        ):
            try:
                call()
            except shardline.ShardlineError as error:
                said.setdefault(what, []).append(f"{type(error).__name__}: {error}")
        engine.destroy()
    engine, *_ = shardline.initialize(model=seeded(Mlp), config=config)
    for what, model in {
        "again": engine.module,
        "engine": engine,
        "trunk": nn.Sequential(engine.module.blocks[0], nn.Linear(32, 32)),
    }.items():
        try:
            shardline.initialize(model=model, config=config)
        except shardline.ShardlineError as error:
            said[what] = [f"{type(error).__name__}: {error}"]
    engine.backward(mse(engine, engine.module, batches[1][0][rank]))  # nothing was changed by what was refused
    engine.step()
    engine.destroy()
    again, *_ = shardline.initialize(model=engine.module, config=config)
    again.destroy()
    return said


@pytest.mark.parametrize("stage", [0, 3])
def test_a_changed_model_and_a_second_engine_are_refused(ranks, stage):
    setup = Setup()
    for said in ranks(change_model, 2, spread(regression, 2, setup, 2), setup.config(stage)):
        named = {"head": "'head.weight'", "adapter": "'head.0.weight'", "block": "'blocks.4.weight'",
                 "removed": "'blocks.1.up.weight'", "tied": "'head.weight'"}  # fmt: skip
        for what, name in named.items():
            assert len(said[what]) == 3
            assert all(each.startswith("ModelError: the model was changed") and name in each for each in said[what])
        for what, name in {
            "again": "blocks.0.up.weight",
            "engine": "module.blocks.0.up.weight",
            "trunk": "0.up.weight",
        }.items():
            assert said[what] == [said[what][0]] and f"'{name}' is managed by an engine already" in said[what][0]


# --- what trains ------------------------------------------------------------------------------------------------------


def freeze_and_unfreeze(names, batches, config):
    import shardline

    rank = dist.get_rank()
    engine, *_ = shardline.initialize(model=seeded(Mlp), config=config)
    error = state = None
    try:
        for step, window in enumerate(batches):
            if step in (3, 6):
                for name, p in engine.module.named_parameters():
                    if name in names:
                        p.requires_grad_(step == 6)
            for micro in window:
                engine.backward(mse(engine, engine.module, micro[rank]))
                engine.step()
        state = engine.full_state_dict()
    except shardline.errors.ShardlineError as raised:
        error = str(raised)
    engine.destroy()
    return error, state


FROZEN = {
    "a whole block": [f"blocks.1.{layer}.{kind}" for layer in ("up", "down") for kind in ("weight", "bias")],
    "one weight": ["blocks.2.up.weight"],
    "head and first": ["head.weight", "head.bias", "blocks.0.up.bias"],
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("names", FROZEN)
@pytest.mark.parametrize("stage", STAGES)
def test_freezing_at_step_3_and_unfreezing_at_step_6(ranks, stage, names, optimizer):
    """Meanwhile a frozen weight neither moves nor decays, and its optimizer state waits."""
    setup = Setup("fp32", optimizer, accumulation=2)
    batches = spread(regression, STEPS, setup, 2)
    twin = setup.twin(seeded(Mlp))
    for step, window in enumerate(batches):
        if step in (3, 6):
            for name in FROZEN[names]:
                twin.params[name].requires_grad_(step == 6)
        for micro in window:
            for batch in micro:
                twin.backward(mse(twin, twin.model, batch))
        twin.step()
    results = ranks(freeze_and_unfreeze, 2, FROZEN[names], batches, setup.config(stage))
    errors = {error for error, _ in results}
    if errors != {None}:
        assert all(error and any(name in error for name in FROZEN[names]) for error in errors), errors
        return
    for _, state in results:
        assert_close(state, twin.state())


def add_group_later(batches, config, params):
    import shardline

    rank = dist.get_rank()
    model = seeded(Mlp)
    optimizer = torch.optim.SGD(model.blocks.parameters(), **params)
    engine, optimizer, *_ = shardline.initialize(model=model, optimizer=optimizer, config=config)
    error = state = None
    try:
        for step, window in enumerate(batches):
            if step == 3:
                optimizer.add_param_group({"params": list(engine.module.head.parameters()), "lr": 0.2})
            engine.backward(mse(engine, engine.module, window[0][rank]))
            engine.step()
        state = engine.full_state_dict()
        lrs = [group["lr"] for group in optimizer.param_groups]
    except shardline.errors.ShardlineError as raised:
        error, lrs = str(raised), None
    engine.destroy()
    return error, state, lrs


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_add_param_group(ranks, stage, dtype):
    """The head joins the optimizer at step 3; until then it keeps its first weights."""
    setup = Setup(dtype, "SGD")
    config = {key: value for key, value in setup.config(stage).items() if key != "optimizer"}
    params = OPTIMIZERS["SGD"][0]
    batches = spread(regression, 6, setup, 2)

    def of_blocks(masters):
        return torch.optim.SGD([m for name, m in masters.items() if name.startswith("blocks")], **params)

    twin = setup.twin(seeded(Mlp), of_blocks)
    before = twin.state()
    for step, window in enumerate(batches):
        if step == 3:
            head = [master for name, master in twin.masters.items() if name.startswith("head")]
            twin.optimizer.add_param_group({"params": head, "lr": 0.2})
        for batch in window[0]:
            twin.backward(mse(twin, twin.model, batch))
        twin.step()
    for error, state, lrs in ranks(add_group_later, 2, batches, config, params):
        if error is not None:
            assert "head" in error or "add_param_group" in error, error
            continue
        assert lrs == [params["lr"], 0.2]
        assert_close(state, twin.state(), dtype, before)
