"""Routes the methods of the returned optimizer through the engine, which holds its gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from types import MethodType
from typing import Any

from torch.optim import Optimizer

from shardline.errors import UsageError

__all__ = ["guard"]


def guard(
    optimizer: Optimizer,
    *,
    stepping: Callable[[], bool],
    zero_grad: Callable[[], None],
    add_group: Callable[[Callable[[dict[str, Any]], None], dict[str, Any]], None],
    state_dict: Callable[[], dict[str, Any]],
    load_state_dict: Callable[[Mapping[str, Any]], None],
) -> Callable[[], None]:
    """Route the methods of ``optimizer`` through the engine; return what undoes it.

    Args:
        optimizer: changed in place. A scheduler that was made from it before goes on working.
        stepping: whether the engine itself steps the optimizer now; at other times ``step`` raises `UsageError`.
        zero_grad: discards the gradients of the window.
        add_group: is given the original ``add_param_group`` and the group.
        state_dict, load_state_dict: replace the optimizer's own, which handle this rank's runs only.
    """
    original, add = optimizer.step, optimizer.add_param_group

    @wraps(original)
    def step(self: Optimizer, closure: Any = None) -> Any:
        if not stepping():
            raise UsageError("optimizer.step() was called directly. Call engine.step(), which all ranks do together.")
        return original() if closure is None else original(closure)

    def zero(self: Optimizer, set_to_none: bool = True) -> None:
        zero_grad()

    def add_param_group(self: Optimizer, group: dict[str, Any]) -> None:
        add_group(add, group)

    def give_state(self: Optimizer) -> dict[str, Any]:
        return state_dict()

    def take_state(self: Optimizer, state_dict: Mapping[str, Any]) -> None:
        load_state_dict(state_dict)

    methods: dict[str, Callable[..., Any]] = {
        "step": step,
        "zero_grad": zero,
        "add_param_group": add_param_group,
        "state_dict": give_state,
        "load_state_dict": take_state,
    }
    before = {name: optimizer.__dict__[name] for name in methods if name in optimizer.__dict__}
    for name, method in methods.items():
        setattr(optimizer, name, MethodType(method, optimizer))

    def undo() -> None:
        for name in methods:
            optimizer.__dict__.pop(name, None)
        optimizer.__dict__.update(before)

    return undo
