"""Learning-rate schedules: DeepSpeed's five as torch schedulers with a closed form, and torch's own by name.

The five follow DeepSpeed's clock: ``t`` is the number of applied optimizer steps less one. It is -1 at construction,
when the first rate is written into the optimizer, and every `step` adds one. So step number n of the optimizer runs at
``lr(n - 2)``; the warm-ups have ``lr(-1) = lr(0) = minimum``, so their first two steps run at the minimum.
Formulas: DeepSpeed, ``runtime/lr_schedules.py``.
"""

from __future__ import annotations

import copy
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from shardline.errors import ConfigError
from shardline.names import call, nearest

__all__ = [
    "VALID_LR_SCHEDULES",
    "ClosedForm",
    "LRRangeTest",
    "OneCycle",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "build",
    "can_undo",
    "restore",
    "step",
]

logger = logging.getLogger("shardline")

PerGroup = float | Sequence[float]
"""One value for all param groups, or a list with one per group."""


def build(name: str, optimizer: Optimizer, params: Mapping[str, Any] | None = None) -> LRScheduler:
    """The scheduler called ``name`` on ``optimizer``: one of the five (any case) or of ``torch.optim.lr_scheduler``.

    Raises `ConfigError` for an unknown name or parameter (naming the nearest), a missing or impossible one, and for
    ``ReduceLROnPlateau``, whose step needs a measurement that the engine does not have.
    """
    own = {one.casefold(): one for one in VALID_LR_SCHEDULES}
    if name.casefold() in own:
        kind: type[LRScheduler] = _OWN[own[name.casefold()]]
    else:
        theirs = _torch_schedulers()
        if name not in theirs:
            known = [*VALID_LR_SCHEDULES, *theirs]
            raise ConfigError(
                f"scheduler.type is {name!r}, which is not a known schedule.{nearest(name, known)} Known are: "
                f"{', '.join(known)}."
            )
        kind = theirs[name]
    if issubclass(kind, ReduceLROnPlateau):
        raise ConfigError(
            "scheduler.type ReduceLROnPlateau needs a metric at every step, which the engine does not have: build it "
            "in your script on the optimizer that initialize returns, and call its step(metric) yourself."
        )
    return call(kind, optimizer, what=f"scheduler {kind.__name__}", params=params or {})


def restore(scheduler: LRScheduler, state: Mapping[str, Any]) -> None:
    """Load ``state`` into any torch scheduler and write its last rate into the optimizer's param groups.

    torch's own ``load_state_dict`` leaves the rate in the optimizer as it was.
    """
    scheduler.load_state_dict(dict(state))
    _write_rates(scheduler.optimizer, scheduler.get_last_lr())


def can_undo(scheduler: Any) -> bool:
    """Whether a step of ``scheduler`` can be taken back: it gives its state and takes one."""
    return hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")


def step(scheduler: Any, optimizer: Optimizer, kwargs: Mapping[str, Any]) -> Callable[[], bool]:
    """Step any scheduler that :func:`can_undo` takes; return what takes it back, exactly, and says whether it did.

    What the loop has set since stays: an option of a param group that is no longer what the schedule wrote, and all of
    it where the scheduler was moved.
    """
    state = _kept(scheduler.state_dict())
    was = [{key: (value, _kept(value)) for key, value in _options(group)} for group in optimizer.param_groups]
    versions = {id(value): value._version for one in was for value, _ in one.values() if isinstance(value, Tensor)}
    scheduler.step(**kwargs)
    moved_to = getattr(scheduler, "last_epoch", None)
    written = []  # group, option, its value and version, what it was before
    for group, before in zip(optimizer.param_groups, was, strict=True):
        for key, value in _options(group):
            old, kept = before.get(key, (None, None))
            version = value._version if isinstance(value, Tensor) else None
            if key in before and (value is not old or version != versions.get(id(value))):
                written.append((group, key, value, version, kept))

    def undo() -> bool:
        if getattr(scheduler, "last_epoch", None) != moved_to:
            return False
        wanted = []
        for group, key, value, version, kept in written:
            now = group[key]
            untouched = now is value and (version is None or now._version == version)
            wanted.append((group, key, kept if untouched else _kept(now)))
        scheduler.load_state_dict(state)  # which may write rates, too
        for group, key, kept in wanted:
            if isinstance(group[key], Tensor) and isinstance(kept, Tensor):
                group[key].copy_(kept)
            else:
                group[key] = kept
        return True

    return undo


def _options(group: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in group.items() if key != "params"]


def _kept(value: Any) -> Any:
    """``value`` as it is now: containers and tensors are copied, what else there may be in a state is not."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: _kept(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_kept(one) for one in value)
    return copy.copy(value) if isinstance(value, dict | list | set | deque) else value


class ClosedForm(LRScheduler):
    """A schedule whose rate is a function of ``t`` alone; subclasses set their fields, then call this constructor.

    ``last_batch_iteration`` is the first ``t``: -1 for a new run.
    """

    def __init__(self, optimizer: Optimizer, last_batch_iteration: int = -1) -> None:
        self._begin = _count("last_batch_iteration", last_batch_iteration, minimum=-1)
        super().__init__(optimizer)
        self.load_state_dict({"last_epoch": self._begin + 1})

    @property
    def t(self) -> int:
        """Applied optimizer steps less one. torch's ``last_epoch``, the number of `step` calls, is one more."""
        return self.last_epoch - 1

    @cached_property
    def bases(self) -> list[float]:
        """Each group's own rate before any schedule wrote one; numbers, so that a step reads no tensor."""
        return [float(lr) for lr in self.base_lrs]

    def lr(self, t: int) -> list[float]:
        """The rate of each param group at ``t >= -1``."""
        raise NotImplementedError

    def get_lr(self) -> list[float | Tensor]:
        return list(self.lr(self.t))

    def state_dict(self) -> dict[str, Any]:
        """The position, as a JSON-able value; everything else follows from the configuration."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the position and write its rate into the optimizer."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1
        self._write()

    def _write(self) -> None:
        self._last_lr = _write_rates(self.optimizer, self.get_lr())


class WarmupLR(ClosedForm):
    """From ``warmup_min_lr`` up to ``warmup_max_lr`` over ``warmup_num_steps`` steps, constant from then on.

    With N = max(2, warmup_num_steps): ``lr(t) = min + (max - min) * g(t)`` where, for t < N, g is ``ln(t+1)/ln(N)``
    ("log") or ``t/N`` ("linear"), and 1 from N on; ``lr(-1) = min``.
    ``warmup_max_lr`` None is each group's own learning rate at construction.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lrs = _per_group("warmup_min_lr", warmup_min_lr, optimizer)
        self.max_lrs = None if warmup_max_lr is None else _per_group("warmup_max_lr", warmup_max_lr, optimizer)
        self.warmup = _Warmup(warmup_num_steps, warmup_type)
        super().__init__(optimizer, last_batch_iteration)

    def lr(self, t: int) -> list[float]:
        max_lrs = self.max_lrs or self.bases
        rise = self.warmup(t) if t < self.warmup.steps else self._after_warmup(t)
        return [low + (high - low) * rise for low, high in zip(self.min_lrs, max_lrs, strict=True)]

    def _after_warmup(self, t: int) -> float:
        return 1.0


class WarmupDecayLR(WarmupLR):
    """`WarmupLR`, then linearly down to ``warmup_min_lr`` at ``total_num_steps``.

    With T = total_num_steps and N as in `WarmupLR`, for t >= N: ``g(t) = max(0, (T - t) / max(1, T - N))``.
    As in DeepSpeed, ``warmup_max_lr`` is 0.001 unless given, whatever the optimizer's own rate; None is that rate.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total = _total(total_num_steps, warmup_num_steps)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)

    def _after_warmup(self, t: int) -> float:
        return max(0.0, (self.total - t) / max(1, self.total - self.warmup.steps))


class WarmupCosineLR(ClosedForm):
    """A warm-up to each group's own rate, then a half cosine down to ``cos_min_ratio`` of it at ``total_num_steps``.

    ``lr(t) = base * r(t)``. With N, T and g as in `WarmupDecayLR`: ``r(-1) = 0``; for t < N,
    ``r = r0 + (1 - r0) * g(t)`` with r0 = warmup_min_ratio; from N on, with p = min(1, (t-N+1) / max(1, T-N)) and
    c = cos_min_ratio, ``r = c + (1 - c) * (1 + cos(pi * p)) / 2``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total = _total(total_num_steps, warmup_num_steps)
        self.warmup = _Warmup(warmup_num_steps, warmup_type)
        self.warmup_min_ratio = _number("warmup_min_ratio", warmup_min_ratio)
        self.cos_min_ratio = _number("cos_min_ratio", cos_min_ratio)
        super().__init__(optimizer, last_batch_iteration)

    def lr(self, t: int) -> list[float]:
        return [lr * self._ratio(t) for lr in self.bases]

    def _ratio(self, t: int) -> float:
        if t < 0:
            return 0.0
        if t < self.warmup.steps:
            return self.warmup_min_ratio + (1.0 - self.warmup_min_ratio) * self.warmup(t)
        progress = min(1.0, (t - self.warmup.steps + 1) / max(1, self.total - self.warmup.steps))
        return self.cos_min_ratio + (1.0 - self.cos_min_ratio) * (1.0 + math.cos(math.pi * progress)) / 2.0


class OneCycle(ClosedForm):
    """One cycle of the rate, up and down, with the momentum (beta1) going the other way; then an optional decay.

    With i = t + 1 and S = first + second step size, while t < S: x = i mod S, s = x/first up to x = first, then
    (S - x)/second; a stair count n makes that ``floor(n * s) / n``. ``lr = min + (max - min) * s`` and
    ``betas = (max_mom - (max_mom - min_mom) * s, 0.99)``, at construction ``(min_mom, 0.99)``.
    From t = S on, with k = (t - S + 1) / decay_step_size: ``lr = min / (1 + decay_lr_rate * k)`` and
    ``beta1 = max_mom * (1 + decay_mom_rate * k)``, kept below one; decay_step_size 0 is no decay.

    An optimizer without ``betas`` keeps its momentum, with a warning.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        cycle_min_lr: PerGroup,
        cycle_max_lr: PerGroup,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: float = 2000,
        cycle_second_step_size: float | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: float = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: PerGroup = 0.8,
        cycle_max_mom: PerGroup = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        second_size = cycle_first_step_size if cycle_second_step_size is None else cycle_second_step_size
        second_stairs = cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        self.first = _number("cycle_first_step_size", cycle_first_step_size)
        self.second = _number("cycle_second_step_size", second_size)
        if self.first == 0:
            raise ConfigError("cycle_first_step_size is 0; the rise of the cycle needs a positive number of steps.")
        self.first_stairs = _count("cycle_first_stair_count", cycle_first_stair_count)
        self.second_stairs = _count("cycle_second_stair_count", second_stairs)
        self.min_lrs = _per_group("cycle_min_lr", cycle_min_lr, optimizer)
        self.max_lrs = _per_group("cycle_max_lr", cycle_max_lr, optimizer)
        self.min_moms = _per_group("cycle_min_mom", cycle_min_mom, optimizer, below=1.0)
        self.max_moms = _per_group("cycle_max_mom", cycle_max_mom, optimizer, below=1.0)
        self.decay_step_size = _number("decay_step_size", decay_step_size)
        self.decay_lr_rate = _number("decay_lr_rate", decay_lr_rate)
        self.decay_mom_rate = _number("decay_mom_rate", decay_mom_rate)
        self.cycle_momentum = cycle_momentum and all("betas" in group for group in optimizer.param_groups)
        if cycle_momentum and not self.cycle_momentum:
            logger.warning(
                "OneCycle does not cycle the momentum: %s has no betas. Set cycle_momentum to false to say so.",
                type(optimizer).__name__,
            )
        super().__init__(optimizer, last_batch_iteration)

    def lr(self, t: int) -> list[float]:
        if t < self.first + self.second:
            height = self._height(t)
            return [low + (high - low) * height for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]
        return [low / (1.0 + self.decay_lr_rate * self._decays(t)) for low in self.min_lrs]

    def betas(self, t: int) -> list[tuple[float, float]]:
        """The betas of each param group at ``t >= -1``. The second is always 0.99, as in DeepSpeed."""
        if t < 0:
            momenta = self.min_moms
        elif t < self.first + self.second:
            height = self._height(t)
            momenta = [high - (high - low) * height for low, high in zip(self.min_moms, self.max_moms, strict=True)]
        else:
            # DeepSpeed lets the product grow without bound; a beta of one or more makes the moments meaningless.
            growth = 1.0 + self.decay_mom_rate * self._decays(t)
            momenta = [min(high * growth, LARGEST_MOMENTUM) if growth > 1.0 else high for high in self.max_moms]
        return [(momentum, 0.99) for momentum in momenta]

    def get_mom(self) -> list[tuple[float, float]] | None:
        """The betas in force, None where the momentum is not cycled."""
        return self.betas(self.t) if self.cycle_momentum else None

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        self._write()

    def _write(self) -> None:
        super()._write()
        if self.cycle_momentum:
            for group, betas in zip(self.optimizer.param_groups, self.betas(self.t), strict=True):
                group["betas"] = betas

    def _height(self, t: int) -> float:
        x = (t + 1) % (self.first + self.second)
        if x <= self.first:
            return _stairs(x, self.first, self.first_stairs)
        return _stairs(self.first + self.second - x, self.second, self.second_stairs)

    def _decays(self, t: int) -> float:
        return (t - self.first - self.second + 1) / self.decay_step_size if self.decay_step_size else 0.0


class LRRangeTest(ClosedForm):
    """A rate that rises without limit, to find the largest one that trains (Smith, arXiv 1803.09820).

    ``lr(t) = min * (1 + rate * d)`` with d = (t + 1) / step_size, its floor in a staircase.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_range_test_min_lr: PerGroup = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lrs = _per_group("lr_range_test_min_lr", lr_range_test_min_lr, optimizer)
        self.step_size = _count("lr_range_test_step_size", lr_range_test_step_size, minimum=1)
        self.step_rate = _number("lr_range_test_step_rate", lr_range_test_step_rate)
        self.staircase = lr_range_test_staircase
        super().__init__(optimizer, last_batch_iteration)

    def lr(self, t: int) -> list[float]:
        rises = (t + 1) // self.step_size if self.staircase else (t + 1) / self.step_size
        return [low * (1.0 + self.step_rate * rises) for low in self.min_lrs]


_OWN: dict[str, type[LRScheduler]] = {
    one.__name__: one for one in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}
VALID_LR_SCHEDULES = list(_OWN)
LARGEST_MOMENTUM = 1.0 - 1e-6


class _Warmup:
    """g(t), from 0 at t <= 0 to 1, for t below ``steps``. At least 2 steps, since ln(1) is not a divisor."""

    def __init__(self, steps: int, shape: str) -> None:
        if shape not in ("log", "linear"):
            raise ConfigError(f"warmup_type is {shape!r}; it must be 'log' or 'linear'.")
        self.steps = max(2, _count("warmup_num_steps", steps))
        self.shape = shape

    def __call__(self, t: int) -> float:
        if t < 0:
            return 0.0
        return math.log(t + 1) / math.log(self.steps) if self.shape == "log" else t / self.steps


def _stairs(x: float, size: float, count: int) -> float:
    # The product comes before the division, so that the top of the cycle is exactly the last stair.
    return math.floor(x * count / size) / count if count else x / size


def _write_rates(optimizer: Optimizer, rates: Sequence[float | Tensor]) -> list[float | Tensor]:
    """Put one rate into each param group, into the tensor where there is one; return what was put, not aliased."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(float(rate))
        else:
            group["lr"] = rate
    return [group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"] for group in optimizer.param_groups]


def _number(name: str, value: Any, *, below: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < below:
        limit = "" if math.isinf(below) else f" and below {below:g}"
        raise ConfigError(f"{name} is {value!r}; it must be a finite number of at least 0{limit}.")
    return float(value)


def _count(name: str, value: Any, *, minimum: int = 0) -> int:
    # JSON writes large counts as 1e6, which Python reads as a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or value < minimum:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {minimum}.")
    return int(value)


def _per_group(name: str, value: PerGroup, optimizer: Optimizer, *, below: float = math.inf) -> list[float]:
    groups = len(optimizer.param_groups)
    if not isinstance(value, list | tuple):
        return [_number(name, value, below=below)] * groups
    if len(value) != groups:
        raise ConfigError(
            f"{name} lists {len(value)} values and the optimizer has {groups} param groups: give one value for all "
            "groups or exactly one for each."
        )
    return [_number(f"{name}[{i}]", one, below=below) for i, one in enumerate(value)]


def _total(total_num_steps: Any, warmup_num_steps: Any) -> int:
    total = _count("total_num_steps", total_num_steps, minimum=1)
    if total < _count("warmup_num_steps", warmup_num_steps):
        logger.warning(
            "total_num_steps is %d and warmup_num_steps is %d: the run ends before the warm-up does.",
            total,
            warmup_num_steps,
        )
    return total


def _torch_schedulers() -> dict[str, type[LRScheduler]]:
    module = torch.optim.lr_scheduler
    found = {name: getattr(module, name) for name in module.__all__}
    return {name: one for name, one in found.items() if one is not LRScheduler and issubclass(one, LRScheduler)}
