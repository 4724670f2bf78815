"""Filling a model on meta: the numbers of its ordinary construction, a module at a time, and nothing left unwritten."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shardline.errors import ModelError
from shardline.meta import fill, is_on_meta
from tests.models import LateInit, Orphan


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))


class Tied(nn.Module):
    """The head's reset draws numbers although its weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)
        self.last = nn.Linear(4, 4)
        self.head.weight = self.embed.weight


class Attention(nn.Module):
    """MultiheadAttention resets its child's weights itself, after the child has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16)


class Cached(nn.Module):
    """Computes a buffer in its reset, next to a buffer that holds no floats."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.empty(4))
        self.register_buffer("count", torch.empty((), dtype=torch.int64), persistent=False)
        self.weight = nn.Parameter(torch.empty(4, dtype=torch.float64), requires_grad=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.angles.copy_(torch.arange(4.0))
        self.count.fill_(3)
        nn.init.normal_(self.weight)


def filled(build, init_fn=None):
    """The model filled from meta, and every parameter as it was when it was taken."""
    with torch.device("meta"):
        model = build()
    assert is_on_meta(model)
    params = dict(model.named_parameters())
    taken: list[tuple[str, torch.Tensor]] = []

    def store(name: str) -> None:
        taken.append((name, params[name].detach().clone()))

    torch.manual_seed(0)
    fill(model, {param: name for name, param in params.items()}, store, lambda module: [], init_fn)
    assert not is_on_meta(model)
    return model, taken


@pytest.mark.parametrize("build", [LateInit, Norms, Tied, Attention, Cached])
def test_the_numbers_of_the_ordinary_construction(build) -> None:
    model, taken = filled(build)
    torch.manual_seed(0)
    expected = build()
    for (name, got), (_, want) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(got, want) and got.dtype is want.dtype and got.requires_grad == want.requires_grad, name
    for (name, got), (_, want) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(got, want), name
    assert sorted(name for name, _ in taken) == sorted(name for name, _ in expected.named_parameters()), "taken once"
    assert all(torch.equal(value, expected.get_parameter(name)) for name, value in taken), "and when it is complete"


def test_parameters_stay_the_objects_they_are_and_ties_ties() -> None:
    with torch.device("meta"):
        model = Tied()
    before = {name: id(param) for name, param in model.named_parameters()}
    model.embed.weight.note = "kept"
    fill(model, {p: n for n, p in model.named_parameters()}, lambda name: None, lambda module: [], None)
    assert {name: id(param) for name, param in model.named_parameters()} == before
    assert model.head.weight is model.embed.weight and model.embed.weight.note == "kept"


def test_modules_come_one_by_one() -> None:
    """When a parameter is taken, those of later modules are still on meta: nobody holds the model whole."""
    with torch.device("meta"):
        model = LateInit()
    params = dict(model.named_parameters())
    here = []

    def store(name: str) -> None:
        here.append(sum(not p.is_meta for p in params.values()) - len(here))

    fill(model, {p: n for n, p in params.items()}, store, lambda module: [], None)
    assert max(here) <= 2, "one module's weight and bias"


def test_what_nothing_writes_is_named() -> None:
    with pytest.raises(ModelError, match="orphan") as raised:
        filled(Orphan)
    assert "embed" not in str(raised.value) and "init_fn" in str(raised.value)


def test_init_fn_writes_what_reset_does_not_and_sees_modules_as_apply_does() -> None:
    visited = []

    def init_fn(module: nn.Module) -> None:
        visited.append(type(module).__name__)
        if isinstance(module, Orphan):
            nn.init.zeros_(module.orphan)

    model, _ = filled(Orphan, init_fn)
    assert bool((model.orphan == 0).all())
    expected: list[str] = []
    Orphan().apply(lambda module: expected.append(type(module).__name__))
    assert visited == expected


def test_init_fn_runs_with_the_units_of_its_module_whole_and_held() -> None:
    """Neighbours that share a unit share its gather; what was written goes back."""
    log: list[str] = []

    class Unit:
        def __init__(self, index: int) -> None:
            self.index, self.holds = index, 0

        def wait(self) -> None:
            log.append(f"wait {self.index}")

        def write_back(self) -> None:
            assert self.holds == 1
            log.append(f"write {self.index}")

        def release(self) -> None:
            assert self.holds == 0
            log.append(f"release {self.index}")

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    units = [Unit(0), Unit(1)]
    of = {model[0]: [units[0]], model[1]: [units[0]], model[2]: [units[1]]}
    names = {p: n for n, p in model.named_parameters()}

    def init_fn(module: nn.Module) -> None:
        log.append("init" if not isinstance(module, nn.Sequential) else "root")

    fill(model, names, lambda name: None, lambda module: of.get(module, []), init_fn)
    assert log == ["wait 0", "init", "init", "write 0", "release 0", "wait 1", "init", "root", "write 1", "release 1"]


def test_a_mixture_keeps_what_is_real() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    kept = model[0].weight.detach().clone()
    taken = []
    fill(model, {p: n for n, p in model.named_parameters()}, taken.append, lambda module: [], None)
    assert torch.equal(model[0].weight, kept) and taken == ["1.weight", "1.bias"]
    assert not model[1].weight.is_meta


def test_on_meta_is_any_tensor() -> None:
    assert not is_on_meta(Norms())
    model = Norms()
    model.norm.running_mean = torch.empty(4, device="meta")
    assert is_on_meta(model) and not is_on_meta(SimpleNamespace(parameters=list, buffers=list))
