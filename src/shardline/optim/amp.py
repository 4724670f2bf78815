"""Unscaling and skipping inside an optimizer's step: who can do it, and the two operations for those written here.

The contract is torch's (``torch.amp.GradScaler``, fused kernels): ``optimizer.grad_scale`` divides the gradients in
place and ``optimizer.found_inf`` equal to 1 leaves everything as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from shardline.optim.muon import MuonAdamW

__all__ = ["FUSED", "ScaledOptimizer", "kept", "placed", "prepare", "takes_grad_scale"]

FUSED: dict[type[Optimizer], frozenset[str]] = {
    Adam: frozenset({"cpu", "cuda", "mps", "xpu"}),
    AdamW: frozenset({"cpu", "cuda", "mps", "xpu"}),
    SGD: frozenset({"cpu", "cuda", "mps", "xpu"}),
    Adagrad: frozenset({"cpu", "cuda"} if torch.__version__ >= "2.13" else {"cpu"}),
}
"""torch's optimizers with a fused kernel, and the device types it exists for."""


class ScaledOptimizer(Optimizer):
    """Base of optimizers that unscale and skip by themselves, where the two attributes are set before a step."""

    # GradScaler hands grad_scale and found_inf over when it finds this.
    _step_supports_amp_scaling = True
    # No defaults: GradScaler multiplies a grad_scale that is there, and deletes both after the step.
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def unscale(self, grads: list[Tensor]) -> Tensor | None:
        """Divide ``grads`` by ``grad_scale`` in place; return the 0-dim bool that says "skip", None for "never"."""
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        skip = None if found_inf is None else found_inf.reshape(()) == 1
        if grad_scale is not None:
            divisor = grad_scale.reshape(())
            torch._foreach_div_(grads, divisor if skip is None else torch.where(skip, 1.0, divisor))
        return skip


def kept(skip: Tensor | None, old: Sequence[Tensor] | float, new: Sequence[Tensor]) -> list[Tensor]:
    """``new``, or ``old`` where ``skip``. Chosen, not multiplied: a skipped gradient may be NaN, and 0 * NaN is."""
    if skip is None:
        return list(new)
    if isinstance(old, float):
        return [torch.where(skip, old, n) for n in new]
    return [torch.where(skip, o, n) for o, n in zip(old, new, strict=True)]


def takes_grad_scale(optimizer: Optimizer) -> bool:
    """Whether ``step()`` unscales and skips right by itself, once `prepare` has seen the optimizer.

    True for `Lion` and `Lamb` and for torch's fused Adam, AdamW, SGD and Adagrad with every group fused. False for
    subclasses (their step may be another), for SGD with momentum and dampening (see `prepare`), and where a hook runs
    before the step, since it would see scaled gradients.
    """
    if optimizer._optimizer_step_pre_hooks:
        return False
    if type(optimizer) not in FUSED:
        return isinstance(optimizer, ScaledOptimizer)
    dampened = any(group.get("momentum") and group["dampening"] for group in optimizer.param_groups)
    return all(group["fused"] for group in optimizer.param_groups) and not dampened


def prepare(optimizer: Optimizer) -> None:
    """Create the state that torch's step would miss or leave uninitialised; call it when the tensors are final.

    That is after building, after replacing parameters or state. For any other optimizer it does nothing.

    * Fused SGD allocates its momentum buffer empty, for the kernel to fill, which a skipped first step does not. Zeros
      give the same first step: ``momentum * 0 + (1 - dampening) * grad`` is the gradient when dampening is 0. With
      dampening torch's first step is another formula, so `takes_grad_scale` refuses that.
    * Adagrad below torch 2.13 makes its state in the constructor only, so not for tensors that come later.
    * `MuonAdamW` loses the state of parameters that have changed sides: neither half can go on with the other's.
    """
    if isinstance(optimizer, MuonAdamW):
        optimizer.drop_foreign_state()
    momentum = type(optimizer) is SGD and takes_grad_scale(optimizer)
    for group in optimizer.param_groups:
        for param in group["params"]:
            if momentum and group["momentum"] and optimizer.state[param].get("momentum_buffer") is None:
                optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
            if type(optimizer) is Adagrad and not optimizer.state[param]:
                device = param.device if group["fused"] else torch.device("cpu")
                optimizer.state[param]["step"] = torch.zeros((), dtype=torch.float32, device=device)
                optimizer.state[param]["sum"] = torch.full_like(param, optimizer.defaults["initial_accumulator_value"])


def placed(key: str, value: Any, param: Tensor, group: Mapping[str, Any], optimizer: Optimizer) -> Any:
    """A copy of ``value``, the state ``key`` of ``param``, on the device where the step of ``optimizer`` expects it.

    Fused and capturable steps count on the device of the parameter, all others of torch on the host; torch moves
    ``step`` alike when it loads a state dict.
    """
    if not isinstance(value, Tensor):
        return value
    if key != "step":
        return value.clone()
    counts_on_device = group.get("fused") or group.get("capturable") or isinstance(optimizer, ScaledOptimizer)
    return value.to(param.device if counts_on_device else "cpu", copy=True)
