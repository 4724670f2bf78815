"""DeepSpeed's five schedules with the attributes and the clock that its scripts use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from shardline.compat.deepspeed.table import SCHEDULE_OPTIONS
from shardline.names import call
from shardline.optim import lr

__all__ = ["LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR", "maker"]

LR_RANGE_TEST, ONE_CYCLE = "LRRangeTest", "OneCycle"
WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR = "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"
WARMUP_LOG_RATE, WARMUP_LINEAR_RATE = "log", "linear"


class _Clock(lr.ClosedForm):
    """``last_batch_iteration`` is the applied steps less one, also as the argument of :meth:`step`."""

    @property
    def last_batch_iteration(self) -> int:
        return self.t

    @last_batch_iteration.setter
    def last_batch_iteration(self, value: int) -> None:
        self.load_state_dict({"last_batch_iteration": value})

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Go on by one, or to ``last_batch_iteration``, and write the rate there into the optimizer."""
        if last_batch_iteration is None:
            super().step()
        else:
            self.last_batch_iteration = last_batch_iteration

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "last_batch_iteration": self.t}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the position, and write its rate into the optimizer."""
        last = state_dict.get("last_epoch", state_dict.get("last_batch_iteration", -1) + 1)
        super().load_state_dict({"last_epoch": last})


class _WarmupNames:
    warmup: Any

    @property
    def warmup_num_steps(self) -> int:
        return self.warmup.steps  # type: ignore[no-any-return]

    @property
    def warmup_type(self) -> str:
        return self.warmup.shape  # type: ignore[no-any-return]


class WarmupLR(_WarmupNames, _Clock, lr.WarmupLR):
    """``shardline.optim.lr.WarmupLR``."""


class WarmupDecayLR(_WarmupNames, _Clock, lr.WarmupDecayLR):
    """``shardline.optim.lr.WarmupDecayLR``."""

    @property
    def total_num_steps(self) -> int:
        return self.total


class WarmupCosineLR(_WarmupNames, _Clock, lr.WarmupCosineLR):
    """``shardline.optim.lr.WarmupCosineLR``."""

    @property
    def total_num_steps(self) -> int:
        return self.total

    @property
    def org_lrs(self) -> list[float]:
        return self.bases

    def get_lr_ratio(self) -> float:
        """The rate over the optimizer's own."""
        return self._ratio(self.t)


class OneCycle(_Clock, lr.OneCycle):
    """``shardline.optim.lr.OneCycle``."""

    @property
    def first_step_size(self) -> float:
        return self.first

    @property
    def second_step_size(self) -> float:
        return self.second

    @property
    def total_size(self) -> float:
        return self.first + self.second

    @property
    def step_ratio(self) -> float:
        """The share of the rise in the cycle."""
        return self.first / self.total_size


class LRRangeTest(_Clock, lr.LRRangeTest):
    """``shardline.optim.lr.LRRangeTest``."""

    @property
    def min_lr(self) -> list[float]:
        return self.min_lrs


_KINDS = {kind.__name__: kind for kind in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)}


def maker(config: Mapping[str, Any]) -> Callable[[Optimizer], Any] | None:
    """What makes the schedule that ``config`` names, where it is one of these and said in full."""
    section = config.get("scheduler")
    name = section.get("type") if isinstance(section, Mapping) else None
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None or not isinstance(section, Mapping):
        return None
    params = section.get("params") or {}
    if not isinstance(params, Mapping) or "auto" in params.values():  # the engine's reader knows what "auto" means
        return None
    params = {key: value for key, value in params.items() if value is not None}
    return lambda optimizer: call(kind, optimizer, what=f"scheduler {name}", params=params)


def get_lr_from_config(config: Mapping[str, Any]) -> tuple[float | None, str]:
    """The rate that a scheduler section names, and why there is none."""
    name, params = config.get("type"), config.get("params")
    if name not in _KINDS or not isinstance(params, Mapping):
        return None, f"{name!r} is not a schedule with params"
    keys = {LR_RANGE_TEST: "lr_range_test_min_lr", ONE_CYCLE: "cycle_max_lr"}
    if name == WARMUP_COSINE_LR:
        return None, f"{name} scales the optimizer's rate"
    return params[keys.get(str(name), "warmup_max_lr")], ""


def __getattr__(name: str) -> Any:
    if name.isupper() and name.lower() in SCHEDULE_OPTIONS:
        return name.lower()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
