"""The methods of the returned optimizer mean what they mean with an engine: its gradients are not where it thinks."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch.optim import Optimizer

from shardline.errors import UsageError

__all__ = ["guard", "unguard"]

_GUARDED = ("step", "zero_grad", "add_param_group")


def guard(
    optimizer: Optimizer,
    *,
    stepping: Callable[[], bool],
    zero_grad: Callable[[], None],
    add_group: Callable[[Callable[[dict[str, Any]], None], dict[str, Any]], None],
) -> None:
    """Route the methods of ``optimizer`` through the engine.

    Args:
        optimizer: changed in place, until :func:`unguard`.
        stepping: whether the engine itself steps the optimizer now; at other times ``step`` raises `UsageError`.
        zero_grad: discards the gradients of the window.
        add_group: is given the original ``add_param_group`` and the group.
    """
    original, add = optimizer.step, optimizer.add_param_group

    def step(self: Optimizer, closure: Any = None) -> Any:
        if not stepping():
            raise UsageError("optimizer.step() was called directly. Call engine.step(), which also talks to the ranks.")
        return original() if closure is None else original(closure)

    def zero(self: Optimizer, set_to_none: bool = True) -> None:
        zero_grad()

    def add_param_group(self: Optimizer, group: dict[str, Any]) -> None:
        add_group(add, group)

    methods: tuple[Callable[..., Any], ...] = (step, zero, add_param_group)
    for name, method in zip(_GUARDED, methods, strict=True):
        setattr(optimizer, name, MethodType(method, optimizer))


def unguard(optimizer: Optimizer) -> None:
    """The optimizer's own methods again."""
    for name in _GUARDED:
        optimizer.__dict__.pop(name, None)
