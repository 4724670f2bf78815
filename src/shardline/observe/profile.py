"""A trace of some steps by ``torch.profiler``, with ranges in the engine's words and the names of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

from shardline.names import listed
from shardline.sharding.unit import Unit

__all__ = ["Profile"]

_MOMENTS = {
    "unshard": "start gather",
    "wait_for_unshard": "wait for gather",
    "reshard": "reshard",
    "reduce_scatter": "start reduce",
    "wait_for_reduce": "wait for reduce",
    "refresh": "refresh",
}
"""Methods of a unit, and what they are called in a trace."""

_NAMED = 3  # parameters of a unit that a range spells out


class Profile:
    """Runs from its making to the end of the last of ``steps``; then the trace is in ``path``.

    Args:
        units: those whose transitions get ranges. They run their own methods again afterwards.
        device: whose kernels are in the trace, in addition to the host's operations.
    """

    def __init__(self, units: Sequence[Unit], device: torch.device, steps: int, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._units, self._remaining = path, list(units), steps
        for unit in self._units:
            for method, words in _MOMENTS.items():
                setattr(unit, method, _in_range(getattr(unit, method), f"{words} {_name(unit)}"))
        on_device = {ProfilerActivity.CUDA} if device.type == "cuda" else set()
        # a torch that records no CUDA would print a stack for every range
        self._profile = profile(activities={ProfilerActivity.CPU, *on_device} & supported_activities())
        self._profile.__enter__()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The range of a phase of the step."""
        with _range(name):
            yield

    def end_step(self) -> bool:
        """A step is over. Returns whether it was the last, and writes the trace then."""
        self._remaining -= 1
        if not self._remaining:
            self.end()
        return not self._remaining

    def end(self) -> None:
        """Write the trace of what has run."""
        self._profile.__exit__(None, None, None)
        for unit in self._units:
            for method in _MOMENTS:
                delattr(unit, method)
        self._profile.export_chrome_trace(str(self.path))


def _name(unit: Unit) -> str:
    names = [entry.param.name for bucket in unit.plan.buckets for entry in bucket.entries]
    return f"{unit.name} ({listed(names, _NAMED)})"


def _range(name: str) -> AbstractContextManager[Any]:
    return record_function(f"shardline: {name}")


def _in_range(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _range(name):
            return method(*args, **kwargs)

    return call
