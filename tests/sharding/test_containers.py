"""Containers of tensors: what is found in them, and what a copy with other tensors has in common with the first."""

from __future__ import annotations

from collections import OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils import _pytree as pytree

from shardline.errors import UsageError
from shardline.sharding.containers import replace_tensors, tensors_in

Pair = namedtuple("Pair", "left right")


@dataclass
class Plain:
    x: Any
    rest: Any = None
    made: Any = field(init=False, default=None)


@dataclass(frozen=True)
class Frozen:
    x: Any
    rest: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.x, Tensor) and self.x.dtype is not torch.float32:
            raise AssertionError("a copy is not made by the constructor")

    @cached_property
    def double(self) -> Any:
        return 2 * self.x


@dataclass(frozen=True, slots=True)
class Slots:
    x: Any
    rest: Any = None


class Attributes(dict):
    """The habit of dicts whose items are attributes too."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Batch(UserDict):
    """As a tokenizer's: items in ``data``, and more beside them."""

    def __init__(self, data, extra=None) -> None:
        super().__init__(data)
        self.extra = extra


class Table(Mapping):
    """A mapping whose constructor takes something else."""

    def __init__(self, rows: int, columns: dict) -> None:
        self._rows, self._columns = rows, columns

    def __getitem__(self, key):
        return self._columns[key]

    def __iter__(self):
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


class Words(list):
    pass


class Registered:
    def __init__(self, x) -> None:
        self.x = x


pytree.register_pytree_node(Registered, lambda value: ([value.x], None), lambda parts, _: Registered(*parts))

# By name: what makes a container of one tensor, and what reads the tensor from it.
WAYS = {
    "tuple": (lambda x: (x, None), lambda c: c[0]),
    "list": (lambda x: [x, "text"], lambda c: c[0]),
    "list subclass": (lambda x: Words([x]), lambda c: c[0]),
    "deque": (lambda x: deque([x], maxlen=3), lambda c: c[0]),
    "set": (lambda x: {x}, lambda c: next(iter(c))),
    "frozenset": (lambda x: frozenset([x]), lambda c: next(iter(c))),
    "dict": (lambda x: {"x": x}, lambda c: c["x"]),
    "OrderedDict": (lambda x: OrderedDict(a=1, x=x), lambda c: c["x"]),
    "defaultdict": (lambda x: defaultdict(list, x=x), lambda c: c["x"]),
    "attribute dict": (lambda x: Attributes(x=x), lambda c: c["x"]),
    "attribute dict, by attribute": (lambda x: Attributes(x=x), lambda c: c.x),
    "MappingProxyType": (lambda x: MappingProxyType({"x": x}), lambda c: c["x"]),
    "UserDict": (lambda x: Batch({"x": x}), lambda c: c["x"]),
    "UserDict, beside its items": (lambda x: Batch({}, extra=[x]), lambda c: c.extra[0]),
    "UserList": (lambda x: UserList([x]), lambda c: c[0]),
    "Mapping": (lambda x: Table(2, {"x": x}), lambda c: c["x"]),
    "namedtuple": (lambda x: Pair(3, x), lambda c: c.right),
    "struct sequence": (lambda x: torch.return_types.max((x, torch.tensor(0))), lambda c: c.values),
    "packed sequence": (lambda x: pack_sequence([x]), lambda c: c.data),
    "dataclass": (lambda x: Plain(1, x), lambda c: c.rest),
    "frozen dataclass": (lambda x: Frozen(x), lambda c: c.x),
    "frozen dataclass with slots": (lambda x: Slots(x), lambda c: c.x),
    "SimpleNamespace": (lambda x: SimpleNamespace(x=x), lambda c: c.x),
    "registered with pytree": (lambda x: Registered(x), lambda c: c.x),
    "deep": (lambda x: [{"a": (Frozen(Pair(1, Batch({"x": x}))),)}], lambda c: c[0]["a"][0].x.right["x"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_has_the_type_and_the_other_tensors(way) -> None:
    make, read = WAYS[way]
    x = torch.ones(2)
    given = make(x)
    assert any(tensor is read(given) for tensor in tensors_in(given))
    before = read(given)
    copy = replace_tensors(given, lambda tensor: tensor.half() if tensor.is_floating_point() else tensor)
    assert type(copy) is type(given) and copy is not given
    assert read(copy).dtype is torch.float16
    assert read(given) is before and before.dtype is torch.float32
    assert replace_tensors(given, lambda tensor: tensor) is given


def test_what_else_a_container_holds_is_shared() -> None:
    other, kept = object(), [torch.arange(2)]
    copy = replace_tensors({"x": torch.ones(1), "other": other, "kept": kept}, Tensor.double)
    assert copy["other"] is other and list(copy) == ["x", "other", "kept"]
    assert replace_tensors([torch.ones(1), kept], lambda t: t.half() if t.is_floating_point() else t)[1] is kept
    assert replace_tensors(defaultdict(list, x=torch.ones(1)), Tensor.half)["new"] == []


def test_what_occurs_twice_is_changed_once() -> None:
    x = torch.ones(2)
    inner = {"x": x}
    copy = replace_tensors([x, inner, inner, Plain(x)], Tensor.half)
    assert copy[0] is copy[1]["x"] is copy[3].x and copy[1] is copy[2] is not inner


def test_a_container_may_hold_itself() -> None:
    x: list = [torch.ones(1)]
    x.append(x)
    assert tensors_in(x) == [x[0]]
    assert replace_tensors(x, Tensor.half)[0].dtype is torch.float16


def test_a_frozen_copy_is_not_made_by_its_constructor() -> None:
    """Neither its constructor nor ``__post_init__`` runs; what it computed and kept is changed as well."""
    given = Frozen(torch.ones(2))
    assert given.double.dtype is torch.float32
    assert replace_tensors(given, Tensor.half).double.dtype is torch.float16


def test_tensors_are_found_in_nested_values() -> None:
    a, b, c, d, e = (torch.tensor(float(i)) for i in range(5))
    value = {"x": [a, (b, {"y": c})], "set": {d}, "opaque": Plain(e, a), "rest": [1, None, "text", Plain]}
    assert [float(t) for t in tensors_in(value)] == [0, 1, 2, 3, 4, 0]
    assert tensors_in(nn.Linear(1, 1)) == []


def test_what_cannot_be_copied_is_named() -> None:
    @dataclass
    class Single:
        x: Any

        def __copy__(self):
            raise TypeError("there is one only")

    with pytest.raises(UsageError, match=r"a Single holds tensors .* there is one only"):
        replace_tensors(Single(torch.ones(1)), Tensor.half)
