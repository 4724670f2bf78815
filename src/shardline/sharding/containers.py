"""What holds tensors: the containers in which a model's inputs and outputs come, read and rebuilt by one rule.

Containers are tuples (named ones too), lists, deques, sets, dicts and what derives from them; dataclasses, attrs
classes, ``SimpleNamespace``, and any ``Mapping`` or ``Sequence``, which hold what their attributes hold; and the types
that are registered with torch's pytree. The engine does not look into modules and other objects.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import lru_cache
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardline.errors import UsageError

__all__ = ["replace_tensors", "tensors_in"]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in ``value``, however deep."""
    found: list[Tensor] = []
    _collect(value, found, {})
    return found


def _collect(value: Any, found: list[Tensor], seen: dict[int, Any]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
        return
    kind = _kind_of(value)
    if kind is not None and id(value) not in seen:
        seen[id(value)] = value  # which also keeps it alive, and its id its own
        for part in kind.open(value):
            _collect(part, found, seen)


def replace_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``change(tensor)`` for each of its tensors; ``value`` itself is never written to.

    A container in which something changes is replaced by a copy of its type; all others are the same objects. What
    occurs twice is changed once.

    Raises:
        UsageError: for a container of which no copy can be made.
    """
    return _replace(value, change, {})


def _replace(value: Any, change: Callable[[Tensor], Tensor], done: dict[int, tuple[Any, Any]]) -> Any:
    known = done.get(id(value))
    if known is not None:
        return known[1]
    if isinstance(value, Tensor):
        result: Any = change(value)
    else:
        kind = _kind_of(value)
        if kind is None:
            return value
        done[id(value)] = value, value  # where it holds itself
        parts = list(kind.open(value))
        others = [_replace(part, change, done) for part in parts]
        result = value
        if any(other is not part for other, part in zip(others, parts, strict=True)):
            try:
                result = kind.close(value, others)
            except Exception as error:
                raise UsageError(
                    f"a {type(value).__name__} holds tensors that the engine must replace (in a copy, as yours is left "
                    f"as it is), and no copy can be made: {type(error).__name__}: {error}. Give the tensors in a "
                    f"tuple, a dict or a dataclass instead."
                ) from error
    done[id(value)] = value, result
    return result


class _Kind(NamedTuple):
    """How containers of one type are read, and how one like another is made with other parts in the same order."""

    open: Callable[[Any], Iterable[Any]]
    close: Callable[[Any, list[Any]], Any]


def _kind_of(value: Any) -> _Kind | None:
    kind = _kind(type(value))  # type: ignore[arg-type]
    if kind is None and type(value) in pytree.SUPPORTED_NODES:
        return _REGISTERED
    return kind


@lru_cache(maxsize=4096)
def _kind(cls: type) -> _Kind | None:
    if issubclass(cls, (str, bytes, bytearray, memoryview, range, int, float, type(None), nn.Module, type)):
        return None
    if issubclass(cls, tuple):
        return _STRUCT_SEQUENCE if hasattr(cls, "n_sequence_fields") else _TUPLE
    if cls is dict:
        return _DICT
    for base, kind in ((dict, _DICT_LIKE), ((list, deque), _LIST), ((set, frozenset, MappingProxyType), _REMADE)):
        if issubclass(cls, base):
            return kind
    if is_dataclass(cls) or hasattr(cls, "__attrs_attrs__") or issubclass(cls, (SimpleNamespace, Mapping, Sequence)):
        return _ATTRIBUTES
    return None


def _names(value: Any) -> list[str]:
    """The attributes that ``value`` has of its own."""
    names = list(getattr(value, "__dict__", ()))
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return [name for name in names if name not in ("__dict__", "__weakref__") and hasattr(value, name)]


def _attributes(value: Any) -> list[Any]:
    return [object.__getattribute__(value, name) for name in _names(value)]


def _with_attributes(value: Any, parts: list[Any]) -> Any:
    other = copy.copy(value)
    for name, part in zip(_names(value), parts, strict=True):
        object.__setattr__(other, name, part)  # past a frozen dataclass, whose copy no other code has seen yet
    return other


def _with_items(value: Any, parts: list[Any]) -> Any:
    other = copy.copy(value)
    for key, part in zip(value, parts, strict=True):
        other[key] = part
    return other


def _with_items_and_attributes(value: Any, parts: list[Any]) -> Any:
    other = _with_items(value, parts[: len(value)])
    for name, part in zip(_names(value), parts[len(value) :], strict=True):
        object.__setattr__(other, name, part)
    return other


def _with_elements(value: Any, parts: list[Any]) -> Any:
    other = copy.copy(value)
    for index, part in enumerate(parts):
        other[index] = part
    return other


def _registered(value: Any) -> Iterable[Any]:
    return pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)[0]


def _with_children(value: Any, parts: list[Any]) -> Any:
    node = pytree.SUPPORTED_NODES[type(value)]
    return node.unflatten_fn(parts, node.flatten_fn(value)[1])


_TUPLE = _Kind(iter, lambda value, parts: tuple.__new__(type(value), parts))
_STRUCT_SEQUENCE = _Kind(iter, lambda value, parts: type(value)(parts))  # what torch.max(x, dim=0) returns
_LIST = _Kind(iter, _with_elements)
_REMADE = _Kind(
    lambda value: value.values() if isinstance(value, Mapping) else value,
    lambda value, parts: type(value)(dict(zip(value, parts, strict=True)) if isinstance(value, Mapping) else parts),
)
_DICT = _Kind(dict.values, _with_items)
_DICT_LIKE = _Kind(lambda value: [*value.values(), *_attributes(value)], _with_items_and_attributes)
_ATTRIBUTES = _Kind(_attributes, _with_attributes)
_REGISTERED = _Kind(_registered, _with_children)
