"""Modes: what the user entered around a call of the engine ends where the engine's own tensor work begins."""

from __future__ import annotations

import contextlib
import shutil

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import shardline
from tests.harness import Setup, assert_identical, check_against_twin, seeded, spread, start
from tests.models import Block, Mlp, mse, regression


class Dispatched(TorchDispatchMode):
    """Notes what is dispatched under it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """Notes which of torch's functions are called under it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "none": contextlib.nullcontext,
    "dispatch": Dispatched,
    "function": Called,
    "device": lambda: torch.device("meta"),
    "default device": default_device,
    "default dtype": default_dtype,
    "deterministic fill": deterministic,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
    "fake tensors": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "all at once": lambda: nested(Called(), Dispatched(), torch.autocast("cpu"), torch.device("meta")),
}

HARMLESS = [name for name in MODES if name not in ("autocast", "inference", "fake tensors", "all at once")]
"""Under these a forward and a backward compute what they compute without."""


@contextlib.contextmanager
def nested(*modes):
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        yield


def evaluated(engine, mode, x):
    with torch.no_grad(), MODES[mode]():
        return engine(x)


def trained(batches, config, directory, names):
    """Per mode: train with every call of the engine under it, forward and backward only where that changes nothing."""
    rank, states = dist.get_rank(), []
    for name in names:
        inner, outer = (MODES[name], MODES["none"]) if name in HARMLESS else (MODES["none"], MODES[name])
        model = seeded(Mlp)
        with inner():
            engine = shardline.initialize(model=model, config=config)[0]
        evaluated(engine, name, torch.ones(2, 32))
        for window in batches:
            for micro in window:
                with inner():
                    loss = mse(engine, engine.module, micro[rank])
                    engine.backward(loss)
                with outer(), inner():
                    engine.step()
                evaluated(engine, name, torch.ones(2, 32))
        with MODES[name]():
            engine.save_checkpoint(directory)
            engine.load_checkpoint(directory)
            with engine.gathered_parameters(write=True):
                pass
            states.append(engine.full_state_dict())
            engine.destroy()
        dist.barrier()
        if not rank:
            shutil.rmtree(directory)
        dist.barrier()
    return states


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_no_mode_changes_what_the_engine_does(ranks, tmp_path, stage):
    batches = spread(regression, 2, Setup(), 2)
    found = ranks(trained, 2, batches, Setup().config(stage), str(tmp_path / "saved"), list(MODES), timeout=100)
    for states in found:
        for name, state in zip(MODES, states, strict=True):
            try:
                assert_identical(state, found[0][0])
                assert all(type(value) is torch.Tensor and not value.is_inference() for value in state.values())
            except AssertionError as error:
                raise AssertionError(f"under {name}: {error}") from error


def seen_by(kind, stage, directory):
    """What a mode sees of an evaluation, in order, and of everything that is not a forward."""
    engine = start(Mlp, Setup("bf16").config(stage))
    x, y = regression(4)
    engine.backward(mse(engine, engine.module, (x, y)))
    with kind() as own:
        engine.step()
        with engine.gathered_parameters():
            pass
        engine.full_state_dict()
        engine.save_checkpoint(directory)
        engine.load_checkpoint(directory)
        engine.zero_grad()
        _ = engine.skipped_steps
    x = x.bfloat16()
    with torch.no_grad(), kind() as forward:
        engine(x)
    plain = seeded(Mlp).bfloat16()
    with torch.no_grad(), kind() as expected:
        plain(x)
    engine.destroy()
    return own.seen, forward.seen, expected.seen


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("kind", [Dispatched, Called])
def test_a_mode_sees_the_users_operations_only(ranks, kind, stage, tmp_path):
    for own, forward, expected in ranks(seen_by, 2, kind, stage, str(tmp_path)):
        assert own == []
        assert forward[-len(expected) :] == expected
        assert set(forward[: -len(expected)]) <= {"is_floating_point", "to"}  # the cast of the input is the user's


# --- selective activation checkpointing -------------------------------------------------------------------------------


def save_products(ctx, op, *args, **kwargs):
    kept = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def save_all(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE


class Selective(Mlp):
    policy = staticmethod(save_products)

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, context_fn=self.contexts)
        return self.head(x)

    def contexts(self):
        return create_selective_checkpoint_contexts(self.policy)


class SaveAll(Selective):
    policy = staticmethod(save_all)


@pytest.mark.parametrize("build", [Selective, SaveAll])
def test_selective_checkpointing(ranks, build):
    check_against_twin(ranks, build, mse, regression, stages=(0, 2, 3), setup=Setup(accumulation=2), steps=2)


def test_selective_checkpointing_over_gloo(ranks):
    setup = Setup("bf16", more={"communication_transport": "gloo"})
    check_against_twin(ranks, Selective, mse, regression, stages=(1, 3), setup=setup, steps=2)


# --- the model's own modes --------------------------------------------------------------------------------------------


class Moody(Mlp):
    """Its forward enters modes of its own around some of its blocks."""

    def forward(self, x):
        x = self.blocks[0](x)
        with Dispatched(), Called():
            x = self.blocks[1](x)
            with torch.autocast("cpu", enabled=False), torch.device("meta"):
                x = self.blocks[2](x)
        return self.head(self.blocks[3](x))


def test_modes_inside_of_a_forward(ranks):
    check_against_twin(ranks, Moody, mse, regression, stages=(2, 3), steps=2)


class ByName(nn.Module):
    """Uses weights outside of their modules, under a mode: their gather is the engine's."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        with Dispatched(), torch.device("meta"):
            for block in self.blocks:
                x = torch.nn.functional.linear(x, block.up.weight)
        return x


def test_a_sealed_weight_is_gathered_outside_of_modes(ranks):
    check_against_twin(ranks, ByName, mse, regression, stages=(2, 3), steps=2)
