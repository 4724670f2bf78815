"""The console sink: a progress line, phase times, transfers, skipped steps and notices, as standard logging."""

from __future__ import annotations

import logging
import sys
from collections import defaultdict

from shardline.config import Config
from shardline.events import Event, Notice, PhaseTimes, StepDone, StepSkipped
from shardline.observe.sink import Run, Sink
from shardline.observe.values import device_tflops

__all__ = ["Console"]

logger = logging.getLogger("shardline")
progress = logging.getLogger("shardline.progress")


class Console(Sink):
    """Turns events into log lines.

    ``every`` gives one INFO line each so many steps on the logger ``shardline.progress``, ``phases`` the mean time of
    each phase over the same steps (over one step without ``every``), and ``transfers`` the mean of what was sent and
    waited. Skipped steps and notices are always a WARNING on ``shardline``. Where the program has not configured
    logging, lines go to stderr as they are.
    """

    waits = False

    def __init__(
        self, every: int | None = None, *, phases: bool = False, transfers: bool = False, verbose: bool = False
    ) -> None:
        self._every, self._phases, self._transfers, self._verbose = every, phases, transfers, verbose
        self._samples = 0
        self._seconds = 0.0
        self._phase_seconds: defaultdict[str, float] = defaultdict(float)
        self._phase_steps = 0
        self._sent: defaultdict[str, float] = defaultdict(float)
        self._steps = 0

    @classmethod
    def of(cls, config: Config) -> Console:
        """The console that ``config`` asks for."""
        comms = config.comms_logger
        return cls(
            config.steps_per_print or None,
            phases=config.wall_clock_breakdown,
            transfers=comms is not None and comms.enabled,
            verbose=comms is not None and comms.verbose,
        )

    def open(self, run: Run) -> None:
        if not logger.hasHandlers():
            handler = _BesideBars()
            handler.setFormatter(logging.Formatter("%(message)s"))
            logger.addHandler(handler)
        if (self._every or self._phases or self._transfers) and progress.level == logging.NOTSET:
            progress.setLevel(logging.INFO)  # asked for in the config: shown whatever the root's level

    def receive(self, event: Event) -> None:
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
        if self._every is not None:
            self._samples += event.samples
            self._seconds += event.seconds
            if event.step % self._every == 0:
                rate = self._samples / self._seconds if self._seconds > 0 else None
                progress.info("%s", step_line(event, rate))
                self._samples, self._seconds = 0, 0.0
        if self._transfers and event.waited:  # a single process sends nothing
            self._transferred(event)

    def _transferred(self, event: StepDone) -> None:
        waited = {f"rank {rank} waited": seconds for rank, seconds in enumerate(event.waited)}
        for name, value in {**event.sent, **waited}.items():
            self._sent[name] += value
        self._steps += 1
        if self._verbose or event.step % (self._every or 1) == 0:
            means = {name: value / self._steps for name, value in self._sent.items()}
            progress.info("%s", transfer_line(event.step, means, list(event.sent)))
            self._sent.clear()
            self._steps = 0

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


class _BesideBars(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to stderr, above a progress bar if tqdm shows one."""

    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" not in sys.modules:
            super().emit(record)
            return
        from tqdm import tqdm

        tqdm.write(self.format(record), file=self.stream)


def step_line(event: StepDone, samples_per_second: float | None) -> str:
    """``step 100 | loss 2.345 | lr 1.00e-03 | grad norm 0.98 | 123.4 samples/s | 512 MB``, less what is unknown."""
    parts = [f"step {event.step}"]
    if event.loss is not None:
        parts.append(f"loss {event.loss:.4f}")
    parts.append(f"lr {', '.join(f'{rate:.2e}' for rate in dict.fromkeys(map(float, event.lr)))}")
    if event.grad_norm is not None:
        parts.append(f"grad norm {event.grad_norm:.3g}")
    if event.loss_scale is not None:
        parts.append(f"loss scale {event.loss_scale:g}")
    if samples_per_second is not None:
        parts.append(f"{samples_per_second:.1f} samples/s")
    if (tflops := device_tflops(event)) is not None:
        parts.append(f"{tflops:.3g} TFLOP/s" + ("" if event.mfu is None else f" ({event.mfu:.1%} MFU)"))
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


def transfer_line(step: int, means: dict[str, float], operations: list[str]) -> str:
    """``step 100 | gather 12.3 MB | reduce 24.6 MB | rank 0 waited 1.2 ms | rank 1 waited 0.1 ms``."""
    words = [
        f"{name} {value / 1e6:.3g} MB" if name in operations else f"{name} {1e3 * value:.1f} ms"
        for name, value in means.items()
    ]
    return " | ".join([f"step {step}", *words])
