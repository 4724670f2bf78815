"""DeepSpeed's optimizers. Each call makes one of torch's, or of Shardline's own, which the engine runs fused."""

from __future__ import annotations

from typing import Any

from torch.optim import Adagrad, Adam, AdamW, Optimizer

from shardline.errors import OptimizerError
from shardline.optim.lamb import Lamb
from shardline.optim.lion import Lion

__all__ = ["DeepSpeedCPUAdagrad", "DeepSpeedCPUAdam", "DeepSpeedCPULion", "FusedAdam", "FusedLamb", "FusedLion"]

Betas = tuple[float, float]


def FusedAdam(
    params: Any,
    lr: float = 1e-3,
    bias_correction: bool = True,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    adam_w_mode: bool = True,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    set_grad_none: bool = True,
) -> Optimizer:
    """``AdamW``, or ``Adam`` without ``adam_w_mode``.

    Raises:
        OptimizerError: without ``bias_correction``, which torch's optimizers always have.
    """
    if not bias_correction:
        raise OptimizerError("FusedAdam without bias_correction is not offered: torch's Adam always has it.")
    kind = AdamW if adam_w_mode else Adam
    return kind(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)


def DeepSpeedCPUAdam(
    model_params: Any,
    lr: float = 1e-3,
    bias_correction: bool = True,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    adamw_mode: bool = True,
    fp32_optimizer_states: bool = True,
) -> Optimizer:
    """The same, with the options in another order; where states live is a matter of ``offload_optimizer``."""
    return FusedAdam(model_params, lr, bias_correction, betas, eps, adamw_mode, weight_decay, amsgrad)


def DeepSpeedCPUAdagrad(
    model_params: Any,
    lr: float = 1e-2,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    fp32_optimizer_states: bool = True,
) -> Optimizer:
    """``Adagrad``."""
    return Adagrad(model_params, lr=lr, eps=eps, weight_decay=weight_decay)


def FusedLion(
    params: Any,
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.999),
    weight_decay: float = 0.0,
    set_grad_none: bool = True,
    fp32_optimizer_states: bool = True,
) -> Optimizer:
    """``shardline.optim.lion.Lion``."""
    return Lion(params, lr=lr, betas=betas, weight_decay=weight_decay)


DeepSpeedCPULion = FusedLion


def FusedLamb(
    params: Any,
    lr: float = 1e-3,
    bias_correction: bool = True,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    eps_inside_sqrt: bool = False,
    weight_decay: float = 0.0,
    max_grad_norm: float = 0.0,
    max_coeff: float = 10.0,
    min_coeff: float = 0.01,
    amsgrad: bool = False,
) -> Optimizer:
    """``shardline.optim.lamb.Lamb``.

    Raises:
        OptimizerError: for ``max_grad_norm``, which is the configuration's ``gradient_clipping`` here.
    """
    if max_grad_norm:
        raise OptimizerError(
            "FusedLamb(max_grad_norm=...) is not offered: write gradient_clipping in the configuration."
        )
    return Lamb(
        params,
        lr,
        betas,
        eps,
        weight_decay,
        bias_correction=bias_correction,
        eps_inside_sqrt=eps_inside_sqrt,
        max_coeff=max_coeff,
        min_coeff=min_coeff,
    )
