"""The naive twin: one process, the whole model, a loop over every rank's micro-batches. It is the specification.

What Shardline computes on N ranks is, by definition, what this file computes on one. Nothing here is clever: a master
copy of each parameter, a sum of gradients, one division, a plain ``torch.optim`` step. Two habits are the engine's own
and make a single process comparable bit by bit: masters are flat and padded to a multiple of 64 elements (fused kernels
round their vector body and their scalar tail differently); and a loss is divided by the accumulation steps, so that
what is left of the average, the loss scale and clipping are ONE divisor, which is 1 in the plainest case.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class LossScale:
    """Halved after `hysteresis` overflows, doubled after `window` good steps, never below `minimum`."""

    value: float = 1.0
    window: int = 0  # 0: static
    hysteresis: int = 1
    minimum: float = 1.0

    def __post_init__(self) -> None:
        self.good, self.patience = 0, self.hysteresis

    def update(self, overflow: bool) -> None:
        if self.window == 0:
            return
        if not overflow:
            self.good += 1
            if self.good % self.window == 0:
                self.value, self.patience = self.value * 2, self.hysteresis
        elif self.patience > 1:
            self.good, self.patience = 0, self.patience - 1
        else:
            self.good, self.value = 0, max(self.value / 2, self.minimum)


class Twin:
    """`model` trained in `dtype` with fp32 masters; `optimizer` builds a torch.optim from {name: flat master}."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[dict[str, Tensor]], torch.optim.Optimizer],
        dtype: torch.dtype = torch.float32,
        clip: float = 0.0,
        scale: LossScale | None = None,
        accumulation: int = 1,
    ) -> None:
        self.model, self.dtype, self.clip, self.scale = model, dtype, clip, scale or LossScale()
        self.accumulation = accumulation
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {name: _flat(p.detach()) for name, p in self.params.items()}
        self.optimizer = optimizer(self.masters)
        keep = {p for m in model.modules() if getattr(m, "running_mean", None) is not None for p in m.parameters()}
        for p in model.parameters():
            if p.dtype == torch.float32 and p not in keep:  # statistics stay in fp32, and so do those layers' weights
                p.data = p.data.to(dtype)
        self.norm, self.skipped = 0.0, 0
        self.zero_grad()

    def __call__(self, *inputs: object) -> object:
        return self.model(*(x.to(self.dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs))

    def zero_grad(self) -> None:
        self.model.zero_grad()
        self.sums, self.weight = {name: torch.zeros_like(m) for name, m in self.masters.items()}, 0.0

    def backward(self, loss: Tensor, weight: float = 1.0, count: float | None = None) -> None:
        """Add `weight` times this micro-batch's gradient; the average divides by all `count`s (default: `weight`s)."""
        (loss * (weight * self.scale.value / self.accumulation)).backward()
        for name, p in self.params.items():
            if p.grad is not None:
                self.sums[name] += _flat(p.grad.to_dense() if p.grad.is_sparse else p.grad)
        self.model.zero_grad()
        self.weight += weight if count is None else count

    @property
    def average(self) -> float:
        """What `sums` are divided by to be averaged and unscaled."""
        return self.weight / self.accumulation * self.scale.value

    def step(self, clip_by: float | None = None) -> bool:
        """Clip and update; False where infs or NaNs made it skip. `clip_by`: a norm to clip by instead of its own."""
        divisor = self.average
        self.norm = math.sqrt(sum(g.double().square().sum().item() for g in self.sums.values())) / divisor
        overflow = not math.isfinite(self.norm)
        if not overflow:
            if self.clip > 0:
                divisor *= max(1.0, ((clip_by or self.norm) + 1e-6) / self.clip)
            for name, master in self.masters.items():
                master.grad = self.sums[name] / divisor if self.params[name].requires_grad else None
            self.optimizer.step()
            self.publish()
        self.skipped += overflow
        self.scale.update(overflow)
        self.zero_grad()
        return not overflow

    def publish(self) -> None:
        """Masters to weights; call it after editing `masters` by hand."""
        for name, p in self.params.items():
            p.data.copy_(self.master(name))

    def master(self, name: str) -> Tensor:
        p = self.params[name]
        return self.masters[name][: p.numel()].view(p.shape)

    def state(self) -> dict[str, Tensor]:
        """Weights under the model's own names, from the masters where there are any; buffers as they are."""
        names = {id(p): name for name, p in self.params.items()}
        state = self.model.state_dict(keep_vars=True)
        return {k: (self.master(names[id(v)]) if id(v) in names else v).detach().clone() for k, v in state.items()}


def _flat(x: Tensor) -> Tensor:
    """A flat fp32 copy of `x` (fp64 if it was), zero-padded to a multiple of 64 elements."""
    padded = torch.zeros(-(-x.numel() // 64) * 64, dtype=torch.promote_types(x.dtype, torch.float32))
    padded[: x.numel()] = x.reshape(-1)
    return padded
