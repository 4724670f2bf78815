"""LAMB: Adam's update, scaled per parameter to the size of the weights (You et al. 2020, arXiv 1904.00962, alg. 2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from shardline.errors import ConfigError
from shardline.optim.amp import ScaledOptimizer, kept
from shardline.optim.closure import evaluate
from shardline.optim.lion import check

__all__ = ["Lamb"]

ROW = 4096


class Lamb(ScaledOptimizer):
    """``p -= lr * trust * u`` with ``u = mhat / (sqrt(vhat) + eps) + weight_decay * p``.

    ``m = b1*m + (1-b1)*g``, ``v = b2*v + (1-b2)*g^2``, ``mhat = m/(1-b1^t)``, ``vhat = v/(1-b2^t)`` (without
    ``bias_correction``: m and v); ``eps_inside_sqrt`` makes the denominator ``sqrt(vhat + eps)``.
    ``trust = |p| / |u|``, limited to [``min_coeff``, ``max_coeff``], and 1 where either norm is 0. The norms are over
    one whole parameter, so Lamb is right on whole parameters only.

    The parameters are DeepSpeed's. Its kernel differs from the paper in one point: it leaves the correction out of u
    and multiplies the rate by ``sqrt(1-b2^t)/(1-b1^t)``, so the decay's share of u and the trust ratio differ while
    t is small.

    State: ``step`` (0-dim fp32), ``exp_avg`` and ``exp_avg_sq`` shaped and typed as the parameter. Raises `ConfigError`
    for hyperparameters out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        eps_inside_sqrt: bool = False,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
    ) -> None:
        check(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, min_coeff=min_coeff)
        if max_coeff < min_coeff:
            raise ConfigError(f"max_coeff is {max_coeff!r}; it must be at least min_coeff, which is {min_coeff!r}.")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "eps_inside_sqrt": eps_inside_sqrt,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        super().__init__(params, defaults)

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
                    self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            steps = [self.state[p]["step"] for p in params]
            exp_avgs = [self.state[p]["exp_avg"] for p in params]
            exp_avg_sqs = [self.state[p]["exp_avg_sq"] for p in params]
            beta1, beta2 = group["betas"]

            skip = self.unscale(grads)
            # A list: with one tensor torch takes the overload for numbers, which waits for the device to read it.
            torch._foreach_add_(steps, 1.0 if skip is None else [(~skip).float()] * len(steps))
            torch._foreach_lerp_(exp_avgs, kept(skip, exp_avgs, grads), 1 - beta1)
            torch._foreach_lerp_(exp_avg_sqs, kept(skip, exp_avg_sqs, torch._foreach_mul(grads, grads)), 1 - beta2)

            if group["bias_correction"]:
                updates = torch._foreach_div(exp_avgs, [_corrected(beta1, t) for t in steps])
                denominators = torch._foreach_div(exp_avg_sqs, [_corrected(beta2, t) for t in steps])
            else:
                updates = torch._foreach_mul(exp_avgs, 1.0)
                denominators = torch._foreach_mul(exp_avg_sqs, 1.0)
            if group["eps_inside_sqrt"]:
                torch._foreach_add_(denominators, group["eps"])
                torch._foreach_sqrt_(denominators)
            else:
                torch._foreach_sqrt_(denominators)
                torch._foreach_add_(denominators, group["eps"])
            torch._foreach_div_(updates, denominators)
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])

            weights, lengths = torch.stack([_norm(p) for p in params]), torch.stack([_norm(u) for u in updates])
            trust = (weights / lengths).clamp(group["min_coeff"], group["max_coeff"])
            trust = torch.where((weights > 0) & (lengths > 0), trust, 1.0)
            torch._foreach_mul_(updates, list(trust.unbind()))
            torch._foreach_add_(params, kept(skip, 0.0, updates), alpha=-float(group["lr"]))
        return loss


def _corrected(beta: float, step: Tensor) -> Tensor:
    """``1 - beta^step``; as expm1, since the plain form loses four digits of fp32 for beta 0.999 and step 1."""
    return -torch.expm1(step * math.log(beta)) if beta else torch.ones_like(step)


def _norm(tensor: Tensor) -> Tensor:
    """The L2 norm in two stages: over rows and then over their norms. One stage in fp32 is 7e-4 off at 16M elements."""
    flat = tensor.reshape(-1)
    whole = flat.numel() // ROW * ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1)
    norm: Tensor = torch.linalg.vector_norm(torch.cat((rows, flat[whole:])))
    return norm
