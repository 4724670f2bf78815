"""The console sink: a progress line, phase times, skipped steps and notices, as standard logging on one rank."""

from __future__ import annotations

import logging
from collections import defaultdict

from shardline.config import Config
from shardline.events import Event, Events, Notice, PhaseTimes, StepDone, StepSkipped

__all__ = ["Console"]

logger = logging.getLogger("shardline")
progress = logging.getLogger("shardline.progress")


class Console:
    """Turns events into log lines.

    ``steps_per_print`` gives one INFO line each so many steps on the logger ``shardline.progress``, and
    ``wall_clock_breakdown`` the mean time of each phase over the same steps (over one step without
    ``steps_per_print``). Skipped steps and notices are always a WARNING on ``shardline``. Where the program has not
    configured logging, lines go to stderr as they are.
    """

    def __init__(self) -> None:
        self._events: Events | None = None
        self._every: int | None = None
        self._phases = False
        self._samples = 0
        self._seconds = 0.0
        self._phase_seconds: defaultdict[str, float] = defaultdict(float)
        self._phase_steps = 0

    def attach(self, events: Events, config: Config, rank: int) -> None:
        """Listen to ``events`` as ``config`` says; on other ranks of the engine's group than 0 this does nothing."""
        if rank != 0:
            return
        self.detach()
        self._every = config.steps_per_print or None
        self._phases = config.wall_clock_breakdown
        if not logger.hasHandlers():
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(message)s"))
            logger.addHandler(handler)
        if (self._every or self._phases) and progress.level == logging.NOTSET:
            progress.setLevel(logging.INFO)  # asked for in the config: shown whatever the root's level
        self._events = events
        events.subscribe(self._receive)

    def detach(self) -> None:
        """Stop listening."""
        if self._events is not None:
            self._events.unsubscribe(self._receive)
            self._events = None

    def _receive(self, event: Event) -> None:
        match event:
            case StepDone():
                self._step_done(event)
            case StepSkipped():
                logger.warning("%s", skipped_line(event))
            case PhaseTimes():
                self._phase_times(event)
            case Notice(message):
                logger.warning("%s", message)

    def _step_done(self, event: StepDone) -> None:
        if self._every is None:
            return
        self._samples += event.samples
        self._seconds += event.seconds
        if event.step % self._every == 0:
            rate = self._samples / self._seconds if self._seconds > 0 else None
            progress.info("%s", step_line(event, rate))
            self._samples, self._seconds = 0, 0.0

    def _phase_times(self, event: PhaseTimes) -> None:
        if not self._phases:
            return
        for phase, seconds in event.seconds.items():
            self._phase_seconds[phase] += seconds
        self._phase_steps += 1
        if event.step % (self._every or 1) == 0:
            progress.info(
                "%s",
                phase_line(event.step, {phase: s / self._phase_steps for phase, s in self._phase_seconds.items()}),
            )
            self._phase_seconds.clear()
            self._phase_steps = 0


def step_line(event: StepDone, samples_per_second: float | None) -> str:
    """``step 100 | loss 2.345 | lr 1.00e-03 | grad norm 0.98 | 123.4 samples/s | 512 MB``, less what is unknown."""
    parts = [f"step {event.step}"]
    if event.loss is not None:
        parts.append(f"loss {float(event.loss):.4f}")
    parts.append(f"lr {', '.join(f'{rate:.2e}' for rate in dict.fromkeys(map(float, event.lr)))}")
    if event.grad_norm is not None:
        parts.append(f"grad norm {float(event.grad_norm):.3g}")
    if event.loss_scale is not None:
        parts.append(f"loss scale {event.loss_scale:g}")
    if samples_per_second is not None:
        parts.append(f"{samples_per_second:.1f} samples/s")
    parts.append(f"{event.memory_bytes / 1e6:.0f} MB")
    return " | ".join(parts)


def skipped_line(event: StepSkipped) -> str:
    """``step 7 skipped: a gradient is inf or NaN; loss scale 65536 -> 32768``."""
    line = f"step {event.step} skipped: {event.reason}"
    if event.loss_scale_before is None:
        return line
    return f"{line}; loss scale {event.loss_scale_before:g} -> {event.loss_scale_after:g}"


def phase_line(step: int, seconds: dict[str, float]) -> str:
    """``step 100 | forward 12.3 ms | backward 25.0 ms``."""
    return " | ".join([f"step {step}", *(f"{phase} {1e3 * value:.1f} ms" for phase, value in seconds.items())])
