"""Gradients as users see them: in ``.grad`` until the engine collects them, and what is there from then to the step.

Autograd fills ``.grad``. The engine moves it into a flat buffer and sums it over ranks. A collected gradient that
is whole on this rank and has no loss scale is returned as a view: changes of it count. Any other is *guarded*:
reading it raises a :class:`UsageError` that names what to call. For a parameter of the model the class does so
(:mod:`shardline.sharding.parameter`); a run of the optimizer holds a :class:`GuardedGrad`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardline.errors import UsageError
from shardline.sharding.containers import replace_tensors, tensors_in
from shardline.sharding.parameter import HARMLESS, autograd_grad, called, set_grad

__all__ = ["GuardedGrad", "collect_grads", "drop_grads", "gradient_error", "has_grads"]


def collect_grads(params: Sequence[Tensor]) -> list[Tensor | None]:
    """What autograd has left in ``.grad`` of each of ``params``, which have none afterwards."""
    with torch._C.DisableTorchFunctionSubclass():
        grads = [autograd_grad(param) for param in params]
        for param, grad in zip(params, grads, strict=True):
            if grad is not None:
                set_grad(param, None)
    return grads


def drop_grads(params: Sequence[Tensor]) -> None:
    """Discard what autograd has left in ``.grad`` of ``params``."""
    collect_grads(params)


def has_grads(params: Sequence[Tensor]) -> bool:
    """Whether autograd has left anything in ``.grad`` of ``params``."""
    with torch._C.DisableTorchFunctionSubclass():
        return any(autograd_grad(param) is not None for param in params)


def gradient_error(name: str, operation: str) -> UsageError:
    return UsageError(
        f"{operation}: the engine has collected the gradient of {name}, and it is not whole on this rank. Clip by "
        f'"gradient_clipping" in the configuration; read and change gradients in engine.before_step(fn); after step() '
        f"their norm is engine.get_global_grad_norm(); engine.zero_grad() discards them."
    )


_UNSCALE = torch._amp_foreach_non_finite_check_and_unscale_


class GuardedGrad(Tensor):
    """Stands in ``.grad`` of an optimizer's parameter. Every use asks for the gradient, or raises.

    Args:
        like: the parameter.
        read: given the name of an operation, the gradient; raises where it is not whole.
        is_unscaled: whether a ``GradScaler.unscale_`` would divide once too often.
    """

    _read: Callable[[str], Tensor]
    _is_unscaled: Callable[[], bool]

    @staticmethod
    def stand_for(like: Tensor, read: Callable[[str], Tensor], is_unscaled: Callable[[], bool]) -> GuardedGrad:
        nothing = torch.full((), float("nan"), dtype=like.dtype, device=like.device).expand(like.shape)
        guarded: GuardedGrad = nothing.as_subclass(GuardedGrad)
        guarded._read, guarded._is_unscaled = read, is_unscaled
        return guarded

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = tuple(args), kwargs or {}
        if func not in HARMLESS:
            guarded = [tensor for tensor in tensors_in(given) if isinstance(tensor, GuardedGrad)]
            if func is _UNSCALE and all(tensor._is_unscaled() for tensor in guarded):
                return None
            name = called(func)
            given = replace_tensors(given, lambda t: t._read(name) if isinstance(t, GuardedGrad) else t)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*given[0], **given[1])

    def __repr__(self) -> str:  # type: ignore[override]
        return f"a gradient that the engine has collected (shape={tuple(self.shape)}, dtype={self.dtype})"
