"""What the calls of the engine mean: backward, step, no_sync, zero_grad, boundaries, counters, casts."""

from __future__ import annotations

from contextlib import nullcontext, suppress

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tests.harness import (
    DTYPES,
    STAGES,
    Setup,
    assert_close,
    assert_identical,
    seeded,
    spread,
    start,
    train_twin,
    transitions,
)
from tests.models import (
    WIDTH,
    Block,
    ConvNet,
    Mlp,
    OpaqueMlp,
    TinyGpt,
    cross_entropy,
    mse,
    opaque_loss,
    regression,
    tokens,
)


def twin_state(setup, batches, build=Mlp, loss_of=mse):
    """Expected weights, and those before."""
    return train_twin(build, loss_of, batches, setup)[1]["state"], setup.twin(seeded(build)).state()


# --- loss.backward() --------------------------------------------------------------------------------------------------


def plain_backward(build, loss_of, batches, config):
    import shardline

    rank = dist.get_rank()
    engine = start(build, config)
    try:
        for window in batches:
            for micro in window:
                loss_of(engine, engine.module, micro[rank]).backward()
                engine.step()
        result = None, engine.full_state_dict()
    except shardline.errors.UsageError as error:
        result = str(error), None
    engine.destroy()
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 2])
def test_plain_backward_means_the_same(ranks, world, stage, dtype):
    setup = Setup(dtype, "SGD", accumulation=2, clip=0.2)
    batches = spread(regression, 3, setup, world)
    expected, before = twin_state(setup, batches)
    for error, state in ranks(plain_backward, world, Mlp, mse, batches, setup.config(stage)):
        assert error is None
        assert_close(state, expected, dtype, before)


@pytest.mark.parametrize("stage", [0, 3])
def test_plain_backward_of_what_cannot_be_hooked(ranks, stage):
    """An output that no pytree knows needs none of the loss scale."""
    setup = Setup("fp16", "SGD")
    batches = spread(regression, 2, setup, 2)
    expected, before = twin_state(setup, batches, OpaqueMlp, opaque_loss)
    for error, state in ranks(plain_backward, 2, OpaqueMlp, opaque_loss, batches, setup.config(stage)):
        assert error is None
        assert_close(state, expected, "fp16", before)


class Layered(Mlp):
    """Returns its output and the hidden state that it was made of, as language models do."""

    def forward(self, x):
        hidden = self.encode(x)
        return self.head(hidden), [hidden]


def layered_loss(call, module, batch):
    out, (hidden,) = call(batch[0])
    return F.mse_loss(out.float(), batch[1]) + 0.1 * hidden.float().square().mean()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", [0, 3])
def test_plain_backward_through_an_output_and_its_origin(ranks, stage, dtype):
    """The gradient that reaches the hidden state by way of the output is no other than the one from the loss."""
    setup = Setup(dtype, "SGD")
    batches = spread(regression, 2, setup, 2)
    expected, before = twin_state(setup, batches, Layered, layered_loss)
    for error, state in ranks(plain_backward, 2, Layered, layered_loss, batches, setup.config(stage)):
        assert error is None
        assert_close(state, expected, dtype, before)


# --- accumulation by hand ---------------------------------------------------------------------------------------------


def with_no_sync(batches, config):
    rank = dist.get_rank()
    engine = start(Mlp, config)
    sent = []
    for window in batches:
        before, _ = transitions(engine)
        for k, micro in enumerate(window):
            with engine.no_sync() if k + 1 < len(window) else nullcontext():
                engine.backward(mse(engine, engine.module, micro[rank]))
            engine.step()
        sent.append(transitions(engine)[0] - before)
    state = engine.full_state_dict()
    engine.destroy()
    return state, [{n for (operation, _), n in counts.items() if operation == "reduce"} for counts in sent]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_no_sync_at_every_stage(ranks, stage, dtype):
    """One reduction per step at stages 2 and 3 too."""
    setup = Setup(dtype, "SGD", accumulation=3)
    batches = spread(regression, 2, setup, 2)
    expected, before = twin_state(setup, batches)
    for state, reductions in ranks(with_no_sync, 2, batches, setup.config(stage)):
        assert_close(state, expected, dtype, before)
        assert reductions == [{1}] * len(batches)


def discard(batches, config):
    """At accumulation 1 a backward is discarded before each step; at 2 also a half window."""
    rank = dist.get_rank()
    engine = start(Mlp, config)
    for window in batches:
        bad = (torch.full((4, 32), 3.0), torch.full((4, 32), -7.0))
        engine.backward(mse(engine, engine.module, bad))
        engine.zero_grad()
        for micro in window:
            engine.backward(mse(engine, engine.module, micro[rank]))
        engine.step(boundary=True)
    state, norm = engine.full_state_dict(), float(engine.get_global_grad_norm())
    engine.destroy()
    return state, norm


@pytest.mark.parametrize("stage", STAGES)
def test_zero_grad_discards(ranks, stage):
    setup = Setup(clip=0.2)
    batches = spread(regression, 3, setup, 2)
    twin, expected = train_twin(Mlp, mse, batches, setup)
    for state, norm in ranks(discard, 2, batches, setup.config(stage)):
        assert_close(state, expected["state"])
        assert norm == pytest.approx(twin.norm, rel=1e-5)


WINDOWS = (1, 3, 2)


def set_boundaries(batches, config):
    """As accelerate drives an engine: it says before each backward whether the window ends."""
    rank = dist.get_rank()
    engine = start(Mlp, config)
    told = []
    for size, window in zip(WINDOWS, batches, strict=True):
        for k in range(size):
            engine.set_gradient_accumulation_boundary(k + 1 == size)
            told.append(engine.is_gradient_accumulation_boundary())
            engine.backward(mse(engine, engine.module, window[k][rank]))
            engine.step()
    result = engine.full_state_dict(), told, engine.global_steps
    engine.destroy()
    return result


@pytest.mark.parametrize("stage", STAGES)
def test_boundaries_set_by_the_caller(ranks, stage):
    """Each window is the sum of what its backwards gave, each over the configured accumulation."""
    setup = Setup(accumulation=3)
    batches = spread(regression, 3, setup, 2)
    twin = setup.twin(seeded(Mlp))
    for size, window in zip(WINDOWS, batches, strict=True):
        for micro in window[:size]:
            for batch in micro:
                twin.backward(mse(twin, twin.model, batch), count=setup.accumulation / size)
        twin.step()
    for state, told, steps in ranks(set_boundaries, 2, batches, setup.config(stage)):
        assert_close(state, twin.state())
        assert told == [True, False, False, True, False, True]
        assert steps == 3


# --- counters ---------------------------------------------------------------------------------------------------------


def count(batches, config):
    rank = dist.get_rank()
    engine = start(Mlp, config)
    seen, returned = [], []
    for window in batches:
        for micro in window:
            boundary = engine.is_gradient_accumulation_boundary()
            loss = mse(engine, engine.module, micro[rank])
            back = engine.backward(loss)
            returned.append((float(back), loss.item()))
            engine.step()
            seen.append(
                (
                    boundary,
                    engine.micro_steps,
                    engine.global_steps,
                    engine.global_samples,
                    engine.skipped_steps,
                    engine.was_step_applied(),
                )
            )
    sizes = engine.train_batch_size(), engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    where = engine.global_rank, engine.world_size, str(engine.device), engine.zero_optimization_stage()
    kinds = engine.fp16_enabled(), engine.bfloat16_enabled()
    engine.destroy()
    return seen, returned, sizes, where, kinds


@pytest.mark.parametrize("stage", [0, 3])
def test_counters(ranks, stage):
    setup = Setup("bf16", accumulation=3)
    batches = spread(regression, 2, setup, 2)
    for rank, (seen, returned, sizes, where, kinds) in enumerate(ranks(count, 2, batches, setup.config(stage))):
        assert seen == [
            (False, 1, 0, 0, 0, False),
            (False, 2, 0, 0, 0, False),
            (True, 3, 1, 24, 0, True),
            (False, 4, 1, 24, 0, False),
            (False, 5, 1, 24, 0, False),
            (True, 6, 2, 48, 0, True),
        ]
        assert all(back == pytest.approx(loss / 3, rel=1e-6) for back, loss in returned)  # as in DeepSpeed, 1.8.1
        assert sizes == (24, 4, 3)
        assert where == (rank, 2, "cpu", stage)
        assert kinds == (False, True)


# --- the model in the engine ------------------------------------------------------------------------------------------


class Curious(nn.Module):
    """Remembers the dtypes that reach it; has attributes for the engine to fall through to."""

    answer = 42

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, *rest, **more):
        self.seen = [x.dtype, *(value.dtype for value in _leaves([rest, more]))]
        return {"out": self.linear(x), "untouched": rest}

    def double_answer(self):
        return 2 * self.answer


def _leaves(value):
    if torch.is_tensor(value):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, (list, tuple)) else []


def look_inside(config):
    engine = start(Curious, config)
    x = torch.randn(2, 8)
    out = engine(x, torch.arange(3), [x, (torch.ones(1, dtype=torch.bool),)], mask=x, nested={"deep": x.double()})
    kept = type(out) is dict and len(out["untouched"]) == 2
    seen = [str(dtype) for dtype in engine.module.seen]
    through = engine.answer, engine.double_answer()
    engine.eval()
    modes = [engine.module.training]
    engine.train()
    modes.append(engine.module.training)
    try:
        engine.no_such_thing  # noqa: B018
        missing = None
    except AttributeError as error:
        missing = str(error)
    is_module = isinstance(engine, nn.Module)
    engine.destroy()
    return seen, kept, through, modes, missing, is_module


@pytest.mark.parametrize(("dtype", "casts"), [("fp32", True), ("bf16", True), ("fp16", True), ("fp16", False)])
def test_inputs_are_cast_and_the_rest_falls_through(ranks, dtype, casts):
    more = {} if casts else {"fp16": {"enabled": True, "auto_cast": False}}
    setup = Setup(dtype, more=more)
    if not casts:
        return check_no_cast(ranks, setup)
    for seen, kept, through, modes, missing, is_module in ranks(look_inside, 2, setup.config(3)):
        low = str(DTYPES[dtype])
        wide = "torch.float64" if dtype == "fp32" else low
        assert seen[:5] == [low, "torch.int64", low, "torch.bool", low] and seen[5] in (low, wide)
        assert kept and is_module
        assert through == (42, 84)
        assert modes == [False, True]
        assert "no_such_thing" in missing


def check_no_cast(ranks, setup):
    for error in ranks(forward_of_fp32, 2, setup.config(0)):
        assert error is not None  # torch's own: fp32 inputs meet fp16 weights


def forward_of_fp32(config):
    engine = start(Curious, config)
    try:
        engine(torch.randn(2, 8))
    except RuntimeError as error:
        return str(error)
    finally:
        engine.destroy()
    return None


def autocast_loss(call, module, batch):
    """What `torch_autocast` means, spelled out; inside the engine it is a nested no-op."""
    with torch.autocast("cpu", torch.bfloat16):
        out = call(batch[0])
    return F.mse_loss(out.float(), batch[1])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_torch_autocast(ranks, accumulation):
    """fp32 weights, bf16 matrix products, at every stage."""
    more = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    setup = Setup("fp32", "SGD", accumulation=accumulation)
    batches = spread(regression, 3, setup, 2)
    before = setup.twin(seeded(Mlp)).state()
    _, expected = train_twin(Mlp, autocast_loss, batches, setup)
    for stage in STAGES:
        for state, dtypes in ranks(autocast, 2, batches, setup.config(stage) | more):
            assert_close(state, expected["state"], "bf16", before)
            assert dtypes == ("torch.float32", "torch.float32")


def autocast(batches, config):
    rank = dist.get_rank()
    engine = start(Mlp, config)
    for window in batches:
        for micro in window:
            x, y = micro[rank]
            out = engine(x)
            engine.backward(F.mse_loss(out, y))  # as under autocast: in fp32
            engine.step()
    result = engine.full_state_dict(), (str(engine.module.head.weight.dtype), str(out.dtype))
    engine.destroy()
    return result


class Actor(nn.Module):
    """Trained through methods of its own, with matrix products in them, as in PPO."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def action_and_value(self, x, *, scale):
        hidden = self(x)
        return {"action": self.head(hidden), "value": (hidden * scale) @ hidden.T}, self.head(x).dtype


def actor_loss(call, batch):
    found, inside = call(batch[0], scale=0.5)
    return F.mse_loss(found["action"], batch[1]) + found["value"].square().mean(), inside


def methods_under_autocast(batches, config):
    rank = dist.get_rank()
    engine = start(Actor, config)
    for window in batches:
        loss, inside = actor_loss(engine.action_and_value, window[0][rank])
        engine.backward(loss)
        engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return state, str(inside), str(loss.dtype)


@pytest.mark.parametrize("stage", [0, 3])
def test_torch_autocast_covers_methods(ranks, stage):
    setup = Setup("fp32", "SGD", more={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}})
    batches = spread(regression, 2, setup, 2)
    twin = setup.twin(seeded(Actor))
    before = twin.state()
    for window in batches:
        for batch in window[0]:
            with torch.autocast("cpu", torch.bfloat16):
                loss, _ = actor_loss(twin.model.action_and_value, batch)
            twin.backward(loss)
        twin.step()
    for state, inside, outside in ranks(methods_under_autocast, 2, batches, setup.config(stage)):
        assert_close(state, twin.state(), "bf16", before)
        assert (inside, outside) == ("torch.bfloat16", "torch.float32")


def method_with_another_dtype(config):
    engine = start(Actor, config)
    x, _ = regression(4)
    notes = []
    try:
        engine.action_and_value(x, scale=0.5)
    except RuntimeError as error:
        notes = error.__notes__
    right, _ = engine.action_and_value(x.bfloat16(), scale=0.5)
    engine.destroy()
    return notes, str(right["action"].dtype)


def test_a_method_in_low_precision_says_what_its_inputs_must_be(ranks):
    for notes, right in ranks(method_with_another_dtype, 1, Setup("bf16").config(0)):
        assert len(notes) == 1 and "torch.bfloat16" in notes[0] and "engine.action_and_value" in notes[0]
        assert right == "torch.bfloat16"


def past_the_engine(config):
    """What was said after calls through the engine, and after calls of the model itself."""
    engine = start(Actor, config)
    told = []
    engine.events.subscribe(lambda event: told.append(event.message) if hasattr(event, "message") else None)
    x, _ = regression(4)
    own = x.to(engine.module.head.weight.dtype)
    engine(x)
    engine.action_and_value(own, scale=0.5)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.get("torch_autocast") is not None):
        engine.module(own)
    through = list(told)
    for call in (engine.module, engine.module.action_and_value, engine.module):
        with suppress(RuntimeError, TypeError):
            call(x)
            call(x, scale=0.5)
    engine.destroy()
    return through, told


@pytest.mark.parametrize("stage", [0, 3])
def test_a_call_past_the_engine_says_what_it_lacks(ranks, stage):
    """Once, where torch_autocast does not reach it, or inputs are not cast; in fp32 there is nothing to say."""
    setups = {
        "torch_autocast": Setup("fp32", more={"torch_autocast": {"enabled": True}}),
        "torch.bfloat16": Setup("bf16"),
        "torch.float16": Setup("fp16"),
        None: Setup("fp32"),
    }
    for word, setup in setups.items():
        for through, told in ranks(past_the_engine, 1, setup.config(stage)):
            assert not through
            assert len(told) == (word is not None) and all(word in each for each in told)


def module_dtypes(config):
    engine = start(TinyGpt, config)
    batch = tokens(4, seed=dist.get_rank())
    losses = []
    for _ in range(4):
        loss = cross_entropy(engine, engine.module, batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    dtypes = {name: str(p.dtype) for name, p in engine.module.named_parameters()}
    engine.destroy()
    return dtypes, losses


@pytest.mark.parametrize(
    ("stage", "names"), [*((stage, ["LayerNorm"]) for stage in STAGES), (3, ["norm1", "norm2", "norm"])]
)
def test_dtypes_by_module_class_or_name(ranks, stage, names):
    more = {"data_types": {"module_dtypes": dict.fromkeys(names, "fp32")}}
    for dtypes, losses in ranks(module_dtypes, 2, Setup("bf16", more=more).config(stage)):
        assert {dtype for name, dtype in dtypes.items() if "norm" in name} == {"torch.float32"}
        assert {dtype for name, dtype in dtypes.items() if "norm" not in name} == {"torch.bfloat16"}
        assert losses[-1] < losses[0]


def buffers_alone(config):
    """Statistics are each rank's own while it trains; `full_state_dict` has rank 0's."""
    engine = start(ConvNet, config)
    x = torch.randn(4, 3, 8, 8) + 10 * dist.get_rank()
    engine(x)
    own = engine.module.norm1.running_mean.clone()
    state = engine.full_state_dict()["norm1.running_mean"]
    engine.destroy()
    return own, state


@pytest.mark.parametrize("stage", [0, 3])
def test_buffers(ranks, stage):
    (own0, state0), (own1, state1) = ranks(buffers_alone, 2, Setup().config(stage))
    assert not torch.allclose(own0, own1)
    assert torch.equal(state0, own0) and torch.equal(state1, own0)


# --- ends -------------------------------------------------------------------------------------------------------------


def inference_only(config):
    engine = start(TinyGpt, config)
    ids, _ = tokens(2)
    with torch.inference_mode():
        out = engine(ids)
    try:
        engine.backward(cross_entropy(engine, engine.module, tokens(2)))
        engine.step()
        error = None
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    state = engine.full_state_dict()
    engine.destroy()
    return out, error, state


@pytest.mark.parametrize("stage", [0, 3])
def test_without_an_optimizer(ranks, stage):
    """Legal for inference (reference 1.1); training then says what is missing."""
    config = {k: v for k, v in Setup().config(stage).items() if k != "optimizer"}
    model = seeded(TinyGpt)
    for out, error, state in ranks(inference_only, 2, config):
        torch.testing.assert_close(out, model(tokens(2)[0]), rtol=1e-5, atol=1e-6)
        assert error is not None and "optimizer" in error
        assert_identical(state, model.state_dict())


def start_twice(config):
    """An engine after an engine on the same model."""
    import shardline

    model = seeded(Mlp)
    states = []
    for _ in range(2):
        engine, *_ = shardline.initialize(model=model, config=config)
        engine.backward(mse(engine, engine.module, regression(4)))
        engine.step()
        states.append(engine.full_state_dict())
        engine.destroy()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    return states, hooks


@pytest.mark.parametrize("stage", STAGES)
def test_a_destroyed_engine_leaves_a_model_for_the_next(ranks, stage):
    setup = Setup("fp32", "SGD")
    one = regression(4)
    expected = []
    model = seeded(Mlp)
    for _ in range(2):
        twin = setup.twin(model)
        twin.backward(mse(twin, model, one))
        twin.step()
        expected.append(twin.state())
    for states, hooks in ranks(start_twice, 2, setup.config(stage)):
        assert hooks == 0
        for state, wanted in zip(states, expected, strict=True):
            assert_close(state, wanted)
