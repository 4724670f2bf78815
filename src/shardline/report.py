"""What each step tells the event stream: that it was done or skipped, and how long its phases took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from shardline.events import Events, PhaseTimes, StepDone, StepSkipped
from shardline.memory import peak_bytes

__all__ = ["Reporter"]


class Reporter:
    """Emits the events of one engine.

    Args:
        events: the stream.
        device: whose work and memory are measured.
        phases: whether to time phases, which synchronises the device.
    """

    def __init__(self, events: Events, device: torch.device, *, phases: bool) -> None:
        self.events, self.device = events, device
        self._phases = phases
        self._seconds: dict[str, float] = {}
        self._last_step = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs within to the phase ``name``."""
        if not self._phases:
            yield
            return
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def done(
        self,
        step: int,
        *,
        loss: Tensor | None,
        lr: list[float | Tensor],
        grad_norm: float | Tensor | None,
        loss_scale: float | None,
        samples: int,
    ) -> None:
        """Step number ``step`` was applied; the arguments are those of :class:`StepDone`."""
        now = time.perf_counter()
        seconds, self._last_step = now - self._last_step, now
        read_memory = partial(peak_bytes, self.device)
        self.events.emit(StepDone(step, loss, lr, grad_norm, loss_scale, samples, seconds, read_memory))
        self._tell_phases(step)

    def skipped(self, step: int, *, late: bool, before: float | None = None, after: float | None = None) -> None:
        """Step number ``step`` was not applied; ``before`` and ``after`` are the loss scales around it."""
        self._last_step = time.perf_counter()
        why = "late gradients of a unit" if late else "gradients that are not finite"
        self.events.emit(StepSkipped(step, why, before, after))
        self._tell_phases(step)

    def _tell_phases(self, step: int) -> None:
        if self._phases:
            self.events.emit(PhaseTimes(step, dict(self._seconds)))
            self._seconds.clear()
