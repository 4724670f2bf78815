"""Compiles a model block by block, so that no compiled region holds a hook that gathers.

Blocks of one class and shape share one compilation: with no hook inside, nothing in them differs but their tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import update_wrapper
from typing import Any

import torch
from torch import nn

from shardline.errors import UsageError
from shardline.plan import UnitPlan
from shardline.plan.describe import blocks, is_below

__all__ = ["compile_blocks", "compiled_in", "is_compiled"]


class _Compiled:
    """Takes the place of one module's ``forward``. A copy of the module, or one from a pickle, has its own again."""

    def __init__(self, module: nn.Module, args: Iterable[Any], kwargs: dict[str, Any]) -> None:
        self._module, self._forward = module, module.forward
        update_wrapper(self, self._forward)
        self._compiled = torch.compile(self._forward, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._forward, memo)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[nn.Module, str]]:
        return getattr, (self._module, "forward")

    def undo(self) -> None:
        if self._module.__dict__.get("forward") is self:
            del self._module.forward
            if self._module.forward != self._forward:  # it had one of its own
                self._module.forward = self._forward


def is_compiled(module: nn.Module) -> bool:
    """Whether the forward of ``module`` is compiled: by :func:`compile_blocks`, or as ``torch.compile(module)``."""
    return isinstance(module.__dict__.get("forward"), _Compiled) or "_orig_mod" in module._modules


def compiled_in(model: nn.Module) -> frozenset[str]:
    """Paths of the modules of ``model`` whose forward is compiled."""
    return frozenset(path for path, module in model.named_modules() if is_compiled(module))


def compile_blocks(
    model: nn.Module, units: Sequence[UnitPlan], args: Sequence[Any], kwargs: dict[str, Any]
) -> Callable[[], None]:
    """Compile the forward of every block of ``model``; return what undoes it.

    A model without blocks is one. Where a block runs modules that bring a unit of their own (it was taken apart, or it
    uses a tied weight from elsewhere), the roots of units inside it are compiled instead, as far as they do not.

    Args:
        units: the units of the model.
        args, kwargs: those of ``torch.compile`` except the function.

    Raises:
        UsageError: if no module is found.
    """
    modules = dict(model.named_modules())

    def is_closed(path: str) -> bool:
        return all(
            path in unit.roots or not any(user != path and is_below(user, path) for user in unit.users)
            for unit in units
        )

    roots = {root for unit in units for root in unit.roots}
    chosen: list[str] = []
    for block in blocks(model) or [""]:
        inside = [block] if is_closed(block) else [path for path in modules if path in roots and is_below(path, block)]
        chosen += [path for path in inside if is_closed(path) and not is_compiled(modules[path])]
    if not chosen:
        raise UsageError(
            "compile() found nothing that it could compile: the modules are compiled already, or each of them uses "
            "units besides its own. Compile functions that use no weights yourself, with torch.compile."
        )
    compiled = [_Compiled(modules[path], args, kwargs) for path in chosen]
    for each in compiled:
        each._module.forward = each

    def undo() -> None:
        for each in compiled:
            each.undo()

    return undo
