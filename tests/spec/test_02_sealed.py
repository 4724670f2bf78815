"""Sealed: whatever is done to a sharded parameter outside a forward, nothing crashes and errors name the parameter."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.distributed as dist

from tests.harness import DTYPES, Setup, assert_close, assert_identical, seeded, spread, start, train_twin
from tests.models import Mlp, TinyGpt, cross_entropy, mse, regression, tokens

MOMENTS = ("initialize", "forward", "backward", "step")

READS = {
    "clone": lambda p: p.clone(),
    "sum": lambda p: p.sum(),
    "detach": lambda p: p.detach().clone(),
    "item": lambda p: p.flatten()[0].item(),
    "tolist": lambda p: p.tolist(),
    "numpy": lambda p: p.detach().numpy().copy(),
    "index": lambda p: p[0].clone(),
    "add": lambda p: p + 1,
    "radd": lambda p: 1 + p,
    "matmul": lambda p: p @ p.t() if p.dim() == 2 else p.dot(p),
    "linear": lambda p: torch.nn.functional.linear(torch.ones(1, p.shape[-1]), p.view(-1, p.shape[-1])),
    "to": lambda p: p.to(torch.float64),
    "float": lambda p: p.double(),
    "view": lambda p: p.view(-1).clone(),
    "norm": lambda p: torch.linalg.vector_norm(p),
    "equal": lambda p: torch.equal(p, p),
    "stack": lambda p: torch.stack([p, p]),
    "foreach": lambda p: torch._foreach_norm([p])[0],
    "contiguous": lambda p: p.contiguous().clone(),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "save": lambda p: torch.save(p, io.BytesIO()),
}

WRITES = {
    "copy_": lambda p: p.copy_(torch.zeros(p.shape)),
    "zero_": lambda p: p.zero_(),
    "clamp_": lambda p: p.clamp_(-0.1, 0.1),
    "add_": lambda p: p.add_(1.0),
    "normal_": lambda p: torch.nn.init.normal_(p),
    "setitem": lambda p: p.__setitem__(0, 0.0),
    "foreach": lambda p: torch._foreach_mul_([p], 2.0),
    "out": lambda p: torch.add(torch.ones(p.shape), 1.0, out=p),
    "source": lambda p: torch.zeros(p.shape).copy_(p),
}

METADATA = {
    "repr": lambda p: len(repr(p)) > 0,
    "str": lambda p: len(str(p)) > 0,
    "format": lambda p: len(f"{p}") > 0,
    "shape": lambda p: tuple(p.shape),
    "size": lambda p: tuple(p.size()),
    "dim": lambda p: p.dim(),
    "numel": lambda p: p.numel(),
    "dtype": lambda p: str(p.dtype),
    "device": lambda p: str(p.device),
    "requires_grad": lambda p: p.requires_grad,
    "is_leaf": lambda p: p.is_leaf,
    "len": lambda p: len(p),
    "hash": lambda p: p in {p},
    "is_floating_point": lambda p: p.is_floating_point(),
    "element_size": lambda p: p.element_size(),
}


def attempt(operation, *args):
    """What happened: ("value", it) or ("error", type name, text)."""
    try:
        with torch.no_grad():
            return "value", operation(*args)
    except Exception as error:
        return "error", type(error).__name__, str(error)


def at_moments(build, loss_of, batches, config, look):
    """Train, calling ``look(engine, moment)`` at every moment of every step."""
    rank = dist.get_rank()
    engine = start(build, config)
    seen = {"initialize": look(engine)}
    for window in batches:
        for micro in window:
            loss = loss_of(engine, engine.module, micro[rank])
            seen["forward"] = look(engine)
            engine.backward(loss)
            seen["backward"] = look(engine)
            engine.step()
            seen["step"] = look(engine)
    state = engine.full_state_dict()
    engine.destroy()
    return seen, state


def touch_parameters(build, loss_of, batches, config):
    def look(engine):
        return {
            (name, kind, operation): _plain(attempt(call, p))
            for name, p in engine.module.named_parameters()
            for kind, table in (("read", READS), ("write", WRITES), ("metadata", METADATA))
            for operation, call in table.items()
        }

    return at_moments(build, loss_of, batches, config, look)


def _plain(outcome):
    """Values that are not plain are of no use to the parent."""
    if outcome[0] == "error" or isinstance(outcome[1], (bool, int, str, tuple)):
        return outcome
    return ("value", None)


def touch_model(build, loss_of, batches, config):
    def look(engine):
        model = engine.module
        whole = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
        return {
            "deepcopy": attempt(lambda: bool(copy.deepcopy(model))),
            "pickle": attempt(lambda: len(pickle.dumps(model))),
            "save": attempt(lambda: torch.save(model, io.BytesIO())),
            "state_dict": attempt(lambda: len(model.state_dict())),
            "engine.state_dict": attempt(lambda: len(engine.state_dict())),
            "load_state_dict": attempt(lambda: str(model.load_state_dict(whole))),
            "repr": attempt(lambda: len(repr(model)) > 0),
            "parameters_to_vector": attempt(lambda: torch.nn.utils.parameters_to_vector(model.parameters()).shape[0]),
        }

    return at_moments(build, loss_of, batches, config, look)


@pytest.mark.parametrize(
    ("build", "loss_of", "make"), [(Mlp, mse, regression), (TinyGpt, cross_entropy, tokens)], ids=["mlp", "gpt"]
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_parameters(ranks, build, loss_of, make, dtype):
    setup = Setup(dtype)
    batches = spread(make, 2, setup, 2)
    results = ranks(touch_parameters, 2, build, loss_of, batches, setup.config(3))
    shapes = {name: tuple(p.shape) for name, p in seeded(build).named_parameters()}
    for seen, _ in results:
        assert set(seen) == set(MOMENTS)
        for moment, outcomes in seen.items():
            for (name, kind, operation), outcome in outcomes.items():
                where = f"{operation} of {name} after {moment}: {outcome}"
                if kind == "metadata":
                    assert outcome[0] == "value", where
                    expected = {"shape": shapes[name], "numel": math.prod(shapes[name]), "dtype": str(DTYPES[dtype])}
                    assert outcome[1] == expected.get(operation, outcome[1]), where
                else:
                    assert outcome[:2] == ("error", "SealedError"), where
                    assert name in outcome[2] and "gathered_parameters()" in outcome[2], where
    # and nothing that was tried left a trace
    before = setup.twin(seeded(build)).state()
    _, expected = train_twin(build, loss_of, batches, setup)
    assert_close(results[0][1], expected["state"], dtype, before)


def test_whole_model(ranks):
    setup = Setup()
    batches = spread(regression, 2, setup, 2)
    results = ranks(touch_model, 2, Mlp, mse, batches, setup.config(3))
    names = [name for name, _ in seeded(Mlp).named_parameters()]
    for seen, _ in results:
        for moment, outcomes in seen.items():
            assert outcomes.pop("repr")[0] == "value"
            for operation, outcome in outcomes.items():
                where = f"{operation} after {moment}: {outcome}"
                assert outcome[0] == "error", where
                if operation.endswith("state_dict"):
                    assert "full_state_dict" in outcome[2] or any(name in outcome[2] for name in names), where
                else:
                    assert any(name in outcome[2] for name in names), where
            for operation in ("state_dict", "engine.state_dict"):
                assert "full_state_dict" in outcomes[operation][2]
    _, expected = train_twin(Mlp, mse, batches, setup)
    assert_close(results[0][1], expected["state"])


def read_data(config):
    """`.data` goes round every guard: it may be refused or be NaN, but neither crash nor give a plausible number."""
    engine = start(Mlp, config)
    seen = {name: attempt(lambda p: p.data.sum().item(), p) for name, p in engine.module.named_parameters()}
    written = {name: attempt(lambda p: p.data.fill_(1.0), p)[0] for name, p in engine.module.named_parameters()}
    state = engine.full_state_dict()
    engine.destroy()
    return seen, written, state


def test_data(ranks):
    for seen, written, state in ranks(read_data, 2, Setup().config(3)):
        for name, outcome in seen.items():
            assert outcome[0] == "error" or outcome[1] != outcome[1], f"{name}.data is {outcome[1]}"
        assert set(written.values()) <= {"error", "value"}
        assert_identical(state, seeded(Mlp).state_dict())


def use_at_one(config):
    """On a single process, and below stage 3, nothing is sealed."""
    engine = start(Mlp, config)
    state = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    loaded = str(engine.module.load_state_dict(engine.module.state_dict()))
    copied = len(list(copy.deepcopy(engine.module).parameters()))
    engine.destroy()
    return state, loaded, copied


@pytest.mark.parametrize(("world", "stage"), [(1, 3), (2, 0), (2, 1), (2, 2)])
def test_nothing_sealed(ranks, world, stage):
    for state, loaded, copied in ranks(use_at_one, world, Setup().config(stage)):
        assert_identical(state, seeded(Mlp).state_dict())
        assert "All keys matched" in loaded
        assert copied == len(state)


def train_once_destroyed(batches, config):
    engine = start(Mlp, config)
    rank = dist.get_rank()
    engine.backward(mse(engine, engine.module, batches[0][0][rank]))
    engine.step()
    model = engine.module
    engine.destroy()
    return {name: p.detach().clone() for name, p in model.named_parameters()}, all(
        type(p) is torch.nn.Parameter for p in model.parameters()
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_destroy_gives_ordinary_parameters_back(ranks, stage):
    setup = Setup()
    batches = spread(regression, 1, setup, 2)
    _, expected = train_twin(Mlp, mse, batches, setup)
    for state, ordinary in ranks(train_once_destroyed, 2, batches, setup.config(stage)):
        assert ordinary
        assert_close(state, expected["state"])
