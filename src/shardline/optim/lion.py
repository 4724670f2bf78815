"""Lion: the sign of an interpolated momentum (Chen et al. 2023, arXiv 2302.06675, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch.optim.optimizer import ParamsT

from shardline.errors import ConfigError
from shardline.optim.amp import ScaledOptimizer, kept
from shardline.optim.closure import evaluate

__all__ = ["Lion"]


class Lion(ScaledOptimizer):
    """``p -= lr * (sign(b1*m + (1-b1)*g) + weight_decay * p)``, then ``m = b2*m + (1-b2)*g``.

    An element whose interpolated momentum is exactly zero takes no step (sign(0) = 0). Defaults are DeepSpeed's; the
    paper advises betas (0.9, 0.99) and a rate 3 to 10 times below AdamW's. State: ``exp_avg``, shaped and typed as the
    parameter. A step holds one temporary of that size per parameter (three with ``found_inf``).

    Raises `ConfigError` for a negative rate or decay and for betas outside [0, 1).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        check(lr=lr, betas=betas, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; see the module `amp` for ``grad_scale``, ``found_inf``."""
        loss = evaluate(closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            exp_avgs = [self.state[p]["exp_avg"] for p in params]
            beta1, beta2 = group["betas"]

            skip = self.unscale(grads)
            updates = torch._foreach_lerp(exp_avgs, grads, 1 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
            torch._foreach_add_(params, kept(skip, 0.0, updates), alpha=-float(group["lr"]))
            torch._foreach_lerp_(exp_avgs, kept(skip, exp_avgs, grads), 1 - beta2)
        return loss


def check(*, betas: tuple[float, float], **at_least_zero: Any) -> None:
    """Refuse hyperparameters outside their range with a `ConfigError` that names one."""
    for name, value in at_least_zero.items():
        if not value >= 0.0:
            raise ConfigError(f"{name} is {value!r}; it must be at least 0.")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ConfigError(f"betas is {betas!r}; it must be two numbers of at least 0 and below 1.")
