"""The events of a step: that it was done or skipped, and how long its phases took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from shardline.events import Events, PhaseTimes, StepDone, StepSkipped
from shardline.runtime.memory import peak_bytes
from shardline.sharding.step import HostVerdict

__all__ = ["Reporter", "StepFigures"]

_LATE = "gradients of a unit came after its reduction; it is reduced at the end of backward from now on"


@dataclass(frozen=True)
class StepFigures:
    """What is known of a step when it ends; the names are those of :class:`StepDone`."""

    step: int
    loss: Tensor | None
    lr: list[float | Tensor]
    loss_scale: float | None
    seconds: float
    phases: dict[str, float]


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

    def ended(
        self, step: int, *, loss: Tensor | None, lr: list[float | Tensor], loss_scale: float | None
    ) -> StepFigures:
        """Step number ``step`` is over; :meth:`tell` follows when its verdict is known."""
        now = time.perf_counter()
        seconds, self._last_step = now - self._last_step, now
        phases, self._seconds = self._seconds, {}
        return StepFigures(step, loss, lr, loss_scale, seconds, phases)

    def tell(self, ended: StepFigures, host: HostVerdict, *, loss_scale: float | None) -> None:
        """What became of a step that was not refused; ``loss_scale`` is that of the step after it."""
        if host.skipped:
            why = _LATE if host.late else "gradients that are not finite"
            self.events.emit(StepSkipped(ended.step, why, ended.loss_scale, loss_scale))
        else:
            read_memory = partial(peak_bytes, self.device)
            self.events.emit(
                StepDone(
                    ended.step,
                    ended.loss,
                    ended.lr,
                    host.norm,
                    ended.loss_scale,
                    host.samples,
                    ended.seconds,
                    read_memory,
                )
            )
        if self._phases:
            self.events.emit(PhaseTimes(ended.step, ended.phases))
