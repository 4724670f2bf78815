"""The options of an optimizer's param groups, which every rank must have alike: each trains only a part of a group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from operator import is_
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["OptimizerOptions"]

_PLAIN = (float, bool, str, type(None))


@dataclass(frozen=True, eq=False)
class _Group:
    """What was read of one param group.

    Attributes:
        objects: the values of its dict, with which it is read again only if one is another object.
        options: names and values, in the order of names.
        text: of the options; the ``repr`` of this.
        fixed: whether an option can only be exchanged and not change by itself, as a tensor or a list does.
        tensors: the options that only a device knows.
    """

    objects: tuple[Any, ...]
    options: list[tuple[str, Any]]
    text: str
    fixed: bool
    tensors: list[Tensor]

    def __repr__(self) -> str:
        return self.text


class OptimizerOptions:
    """Reads the scalar options of every param group: learning rates, betas, weight decay, and those of the user's own.

    An option is left out if it is not a number, string, boolean or None, no tuple of them and no tensor of one element.
    """

    advice = (
        "Every rank must set the same options. Make a learning rate that follows a metric from a metric that all ranks "
        "share: all-reduce it before scheduler.step(metric)."
    )

    def __init__(self, optimizer: Callable[[], Optimizer | None]) -> None:
        self._optimizer = optimizer
        self._known: list[_Group] = []

    def read(self) -> tuple[Sequence[Any], Sequence[Tensor]]:
        optimizer = self._optimizer()
        groups = [] if optimizer is None else optimizer.param_groups
        known = self._known + [_UNREAD] * (len(groups) - len(self._known))
        found = [self._again(group, before) for group, before in zip(groups, known, strict=False)]
        self._known = found
        return found, [tensor for group in found for tensor in group.tensors]

    def _again(self, group: dict[str, Any], known: _Group) -> _Group:
        objects = tuple(group.values())
        if known.fixed and len(objects) == len(known.objects) and all(map(is_, objects, known.objects)):
            return known
        options: list[tuple[str, Any]] = []
        tensors: list[Tensor] = []
        for key in sorted(group):
            value = group[key]
            if type(value) in _PLAIN:
                options.append((key, value))
            elif key != "params":
                _add(options, tensors, key, value)
        fixed = not any(isinstance(value, Tensor | list) for key, value in group.items() if key != "params")
        return _Group(objects, options, repr(options), fixed, tensors)

    def names(self, values: Sequence[Any], tensors: Sequence[float]) -> Mapping[str, str]:
        known = iter(tensors)
        return {
            f"{key} of param group {index}": repr(next(known) if value is _ELSEWHERE else value)
            for index, group in enumerate(values)
            for key, value in group.options
        }


def _add(options: list[tuple[str, Any]], tensors: list[Tensor], key: str, value: Any) -> None:
    """Add an option that is not plain."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            return
        if value.device.type == "cpu":
            options.append((key, float(value)))
        else:
            options.append((key, _ELSEWHERE))
            tensors.append(value.reshape(()))
    elif isinstance(value, Real):  # an int is the float that another rank may have; so is NumPy's
        options.append((key, float(value)))
    elif isinstance(value, tuple | list):
        for place, each in enumerate(value):
            _add(options, tensors, f"{key}[{place}]", each)
    elif isinstance(value, _PLAIN):
        options.append((key, value))


class _Elsewhere:
    """Stands for a value that only a device knows."""

    def __repr__(self) -> str:
        return "on a device"


_ELSEWHERE = _Elsewhere()
_UNREAD = _Group((), [], "", fixed=False, tensors=[])
