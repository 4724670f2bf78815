"""What ``params`` may hold for the optimizers and schedulers known by DeepSpeed's names."""

from __future__ import annotations

from typing import Literal

from shardline.config.kinds import Betas, Integer, Number, OptionalInteger, PerGroup, Section, key

__all__ = ["OPTIMIZERS", "SCHEDULERS", "known"]


class _Optimizer(Section):
    lr: Number = key(1e-3, "Learning rate.", ge=0)
    weight_decay: Number = key(0.0, "Weight decay factor.", ge=0)


class _Torch(_Optimizer):
    foreach: bool | None = key(None, "torch: the multi-tensor implementation.")
    fused: bool | None = key(None, "torch: the fused kernel; chosen by itself where torch has one.")
    maximize: bool = key(False, "torch: step up the gradient instead of down.")
    differentiable: bool = key(False, "torch: let autograd see the step.")


class AdamParams(_Torch):
    betas: Betas = key((0.9, 0.999), "Decay of the running averages of the gradient and of its square.")
    eps: Number = key(1e-8, "Added to the denominator.", ge=0)
    bias_correction: Literal[True] = key(True, "Correct the running averages for starting at zero.")
    amsgrad: bool = key(False, "The AMSGrad variant.")
    adam_w_mode: bool = key(True, "Adam only: true decouples weight decay (AdamW), false adds it to the gradient (L2).")
    torch_adam: bool = key(False, "DeepSpeed: use torch's class, as always here; no effect.")
    fp32_optimizer_states: Literal[True] = key(True, "DeepSpeed: moments in fp32, as always here.")
    set_grad_none: bool = key(True, "DeepSpeed: free gradients after a step; no effect.")
    capturable: bool = key(False, "torch: safe inside a CUDA graph.")


class SGDParams(_Torch):
    momentum: Number = key(0.0, "Momentum factor.", ge=0)
    dampening: Number = key(0.0, "Dampening of momentum.")
    nesterov: bool = key(False, "Nesterov's momentum.")


class AdagradParams(_Torch):
    lr: Number = key(1e-2, "Learning rate.", ge=0)
    lr_decay: Number = key(0.0, "Decay of the learning rate.", ge=0)
    eps: Number = key(1e-10, "Added to the denominator.", ge=0)
    initial_accumulator_value: Number = key(0.0, "Start of the sum of squares.", ge=0)


class LionParams(_Optimizer):
    betas: Betas = key((0.9, 0.999), "Interpolation of the update, and decay of the running average.")


class LambParams(_Optimizer):
    betas: Betas = key((0.9, 0.999), "Decay of the running averages of the gradient and of its square.")
    eps: Number = key(1e-8, "Added to the denominator.", ge=0)
    bias_correction: bool = key(True, "Correct the running averages for starting at zero.")
    eps_inside_sqrt: bool = key(False, "Add eps under the square root.")
    max_coeff: Number = key(10.0, "Upper limit of the trust ratio.", gt=0)
    min_coeff: Number = key(0.01, "Lower limit of the trust ratio.", ge=0)


class MuonParams(Section):
    lr: Number | None = key(None, "Learning rate of both halves; null: muon_lr and adam_lr.", ge=0)
    muon_lr: Number | None = key(None, "Learning rate of Muon's half; null: lr, or 0.02 without it.", ge=0)
    adam_lr: Number | None = key(None, "Learning rate of AdamW's half; null: lr, or 0.0003 without it.", ge=0)
    weight_decay: Number = key(0.0, "Decoupled weight decay of both halves.", ge=0)
    momentum: Number = key(0.95, "Muon: momentum factor.", ge=0)
    nesterov: bool = key(True, "Muon: Nesterov's momentum.")
    ns_steps: Integer = key(5, "Muon: steps of the Newton-Schulz iteration.", ge=1, lt=100)
    ns_method: Literal["standard", "gram"] = key(
        "standard", "DeepSpeed: two ways to compute the same iteration; torch's is the standard one, so no effect."
    )
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = key(
        None, "Muon: how the rate depends on the shape; null is original, sqrt(max(1, rows / columns))."
    )
    per_head_muon: Literal[False] = key(False, "DeepSpeed: orthogonalize attention heads one by one; not supported.")
    betas: Betas = key((0.9, 0.95), "AdamW: decay of the running averages of the gradient and of its square.")
    eps: Number = key(1e-10, "AdamW: added to the denominator.", ge=0)
    adam_w_mode: bool = key(True, "AdamW: true decouples weight decay, false adds it to the gradient (L2).")
    torch_adam: bool = key(False, "DeepSpeed: use torch's class, as always here; no effect.")
    fp32_optimizer_states: Literal[True] = key(True, "DeepSpeed: moments in fp32, as always here.")
    fused: bool | None = key(None, "AdamW: the fused kernel; chosen by itself where torch has one.")


class _Scheduler(Section):
    last_batch_iteration: Integer = key(-1, "Steps already taken; -1 before the first.", ge=-1)


class _Warmup(_Scheduler):
    warmup_num_steps: Integer = key(1000, "Steps of warm-up.", ge=0)
    warmup_type: Literal["log", "linear"] = key("log", "Shape of the warm-up.")


class WarmupLRParams(_Warmup):
    warmup_min_lr: PerGroup = key(0.0, "Rate at the start.")
    warmup_max_lr: PerGroup | None = key(None, 'Rate after the warm-up; null and "auto" are the optimizer\'s lr.')


class WarmupDecayLRParams(_Warmup):
    total_num_steps: Integer = key(..., "Steps of the whole training.", ge=1)
    warmup_min_lr: PerGroup = key(0.0, "Rate at the start.")
    warmup_max_lr: PerGroup | None = key(0.001, 'Rate after the warm-up; null and "auto" are the optimizer\'s lr.')


class WarmupCosineLRParams(_Warmup):
    total_num_steps: Integer = key(..., "Steps of the whole training.", ge=1)
    warmup_min_ratio: Number = key(0.0, "Start of the warm-up as a fraction of the optimizer's lr.", ge=0)
    cos_min_ratio: Number = key(1e-4, "End of the cosine as a fraction of the optimizer's lr.", ge=0)


class OneCycleParams(_Scheduler):
    cycle_min_lr: PerGroup = key(..., "Rate at the start and the end of the cycle.")
    cycle_max_lr: PerGroup = key(..., "Rate at the top of the cycle.")
    decay_lr_rate: Number = key(0.0, "Decay of the rate after the cycle.", ge=0)
    cycle_first_step_size: Integer = key(2000, "Steps of the rise.", ge=1)
    cycle_second_step_size: OptionalInteger = key(None, "Steps of the fall; null is as many as of the rise.", ge=1)
    cycle_first_stair_count: Integer = key(0, "Stairs in the rise; 0 is a straight line.", ge=0)
    cycle_second_stair_count: OptionalInteger = key(None, "Stairs in the fall; null is as many as in the rise.", ge=0)
    decay_step_size: Integer = key(0, "Steps of one decay after the cycle; 0 is no decay.", ge=0)
    cycle_momentum: bool = key(True, "Cycle the momentum against the rate.")
    cycle_min_mom: PerGroup = key(0.8, "Lowest momentum.")
    cycle_max_mom: PerGroup = key(0.9, "Highest momentum.")
    decay_mom_rate: Number = key(0.0, "Decay of the momentum after the cycle.", ge=0)


class LRRangeTestParams(_Scheduler):
    lr_range_test_min_lr: PerGroup = key(1e-3, "Rate at the start.")
    lr_range_test_step_size: Integer = key(2000, "Steps of one rise.", ge=1)
    lr_range_test_step_rate: Number = key(1.0, "Rise per step size, as a fraction of the first rate.", ge=0)
    lr_range_test_staircase: bool = key(False, "Rise in stairs instead of continuously.")


# Names are compared without regard to case.
OPTIMIZERS: dict[str, type[Section]] = {
    "Adam": AdamParams,
    "AdamW": AdamParams,
    "SGD": SGDParams,
    "Adagrad": AdagradParams,
    "Lion": LionParams,
    "Lamb": LambParams,
    "Muon": MuonParams,
}
SCHEDULERS: dict[str, type[Section]] = {
    "WarmupLR": WarmupLRParams,
    "WarmupDecayLR": WarmupDecayLRParams,
    "WarmupCosineLR": WarmupCosineLRParams,
    "OneCycle": OneCycleParams,
    "LRRangeTest": LRRangeTestParams,
}


def known(models: dict[str, type[Section]], name: object) -> type[Section] | None:
    """The model of the parameters of ``name``, None for an unknown class."""
    wanted = name.lower() if isinstance(name, str) else None
    return next((model for one, model in models.items() if one.lower() == wanted), None)
