"""The events of a step: that it was done or skipped, and how long its phases took."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial

from torch import Tensor

from shardline import watch
from shardline.comm import Comm
from shardline.config import Config
from shardline.events import Events, PhaseTimes, StepDone, StepSkipped
from shardline.observe.flops import FlopsProfiler
from shardline.observe.memory import MemoryTrace
from shardline.observe.profile import Profile
from shardline.runtime.clock import Moment, now, seconds_between
from shardline.runtime.memory import peak_bytes
from shardline.sharding.step import HostVerdict
from shardline.sharding.window import Progress

__all__ = ["Reporter", "StepFigures"]

_PHASES = {
    "forward": watch.Phase.FORWARD,
    "backward": watch.Phase.BACKWARD,
    "reduce": watch.Phase.BACKWARD,
    "step": watch.Phase.STEP,
}

_LATE = "gradients of a unit came after its reduction; it is reduced at the end of backward from now on"

_TRACED_STEP = 3
"""The step of a process in which memory is looked at: in the first ones buffers and states are made."""

Phase = tuple[str, Moment, Moment]


@dataclass(frozen=True)
class StepFigures:
    """What is known of a step when it ends; the names are those of :class:`StepDone`."""

    step: int
    lr: list[float | Tensor]
    loss_scale: float | None
    seconds: float
    sent: dict[str, int]
    counted: bool


class Reporter:
    """Emits the events of one engine.

    Args:
        events: the stream.
        comm: whose transfers are reported, whose device is timed, and whose status page is kept up to date.
        config: chooses what is measured.
    """

    def __init__(self, events: Events, comm: Comm, config: Config) -> None:
        self.events, self._comm = events, comm
        self._status = comm.watch.status
        self._times = config.wall_clock_breakdown or config.is_observed
        self._flops: FlopsProfiler | None = None
        if config.flops_profiler.enabled:
            self._flops = FlopsProfiler(config, comm.device, comm.data.size, speaks=comm.data.rank == 0)
        self._phases: list[Phase] = []
        self._delayed: deque[tuple[int, list[Phase]]] = deque()  # phases of steps that the device may not have ended
        self._bytes: Counter[str] = Counter()
        self._last_step = time.perf_counter()
        self._has_emitted = False
        self._traces = _TRACED_STEP if config.run_log.dir is not None and comm.data.rank == 0 else 0
        self._trace: MemoryTrace | None = None
        self._profile: Profile | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs within as phase ``name``, and publish it to the other ranks. Waits for no device."""
        self._status.enter(_PHASES[name])
        try:
            with self._measured(name):
                yield
        finally:
            self._status.leave()

    @contextmanager
    def _measured(self, name: str) -> Iterator[None]:
        if not self._times and self._flops is None and self._profile is None:
            yield
            return
        begin, started = now(self._comm.device), time.perf_counter()
        try:
            counting = nullcontext() if self._flops is None else self._flops.counting(name)
            ranged = nullcontext() if self._profile is None else self._profile.phase(name)
            with counting, ranged:
                yield
        finally:
            self._phases.append((name, begin, now(self._comm.device)))
            if self._trace is not None:
                self._trace.phase(name, started, time.perf_counter())

    def ended(self, step: int, *, lr: list[float | Tensor], loss_scale: float | None) -> StepFigures:
        """Step number ``step`` is over; :meth:`emit` follows when its verdict is known."""
        now_ = time.perf_counter()
        seconds, self._last_step = now_ - self._last_step, now_
        if self._times:
            self._delayed.append((step, self._phases))
        self._phases = []
        if self._traces:
            self._trace_memory(step, seconds)
        if self._profile is not None and self._profile.end_step():
            self._profile = None
        counted = self._flops is not None and self._flops.end_step()
        return StepFigures(step, lr, loss_scale, seconds, self._sent(), counted)

    def start_profile(self, profile: Profile) -> None:
        """Give ``profile`` the phases of the steps that come."""
        self._profile = profile

    @property
    def is_profiling(self) -> bool:
        """Whether a profile runs."""
        return self._profile is not None

    def _trace_memory(self, step: int, seconds: float) -> None:
        """Count down to the step whose memory is looked at; ``step`` has ended, and took ``seconds``."""
        self._traces -= 1
        if self._trace is not None:
            trace, self._trace = self._trace, None
            self.events.emit(trace.end(step))
        elif self._traces == 1:
            self._trace = MemoryTrace(self._comm.device, seconds)

    def _sent(self) -> dict[str, int]:
        """Bytes that this rank sent since the last call: of each buffer the others' parts, or its own to each other."""
        before, self._bytes = self._bytes, Counter(self._comm.log.bytes)
        ranks = self._comm.data.size
        return {name: (count - before[name]) * (ranks - 1) // ranks for name, count in self._bytes.items()}

    def emit(self, ended: StepFigures, host: HostVerdict, progress: Progress, *, loss_scale: float | None) -> None:
        """Emit the event of a step that was not refused; ``loss_scale`` is that of the step after it."""
        if host.skipped:
            bad_loss = host.loss is not None and not math.isfinite(host.loss)
            why = _LATE if host.late else f"gradients that are not finite{', as the loss was not' * bad_loss}"
            self.events.emit(StepSkipped(ended.step, why, ended.loss_scale, loss_scale))
        else:
            self._emit_done(ended, host, progress)
        self._emit_phases()
        if not self._has_emitted:  # sinks were opened in it, which is not part of the next step
            self._has_emitted, self._last_step = True, time.perf_counter()

    def _emit_done(self, ended: StepFigures, host: HostVerdict, progress: Progress) -> None:
        flops, mfu = None, None
        if self._flops is not None:
            if ended.counted:
                self._flops.tell(host.samples)
            flops, mfu = self._flops.of(host.samples, ended.seconds)
        self.events.emit(
            StepDone(
                step=ended.step,
                loss=host.loss,
                lr=ended.lr,
                grad_norm=host.norm,
                loss_scale=ended.loss_scale,
                samples=host.samples,
                seconds=ended.seconds,
                read_memory=cache(partial(peak_bytes, self._comm.device)),
                grad_norms=host.group_norms,
                tokens=host.tokens,
                flops=flops,
                mfu=mfu,
                waited=host.waited if self._comm.data.size > 1 else (),
                sent=ended.sent,
                total_samples=progress.global_samples,
                skipped=progress.skipped_steps,
            )
        )

    def _emit_phases(self, *, wait: bool = False) -> None:
        while self._delayed:
            step, phases = self._delayed[0]
            found: dict[str, float] = {}
            for name, begin, end in phases:
                seconds = seconds_between(begin, end, wait=wait)
                if seconds is None:
                    return
                found[name] = found.get(name, 0.0) + seconds
            self._delayed.popleft()
            self.events.emit(PhaseTimes(step, found))

    def finish(self) -> None:
        """No step follows: emit the events that were delayed."""
        self._emit_phases(wait=True)
        if self._trace is not None:
            self._trace.end(0)
            self._trace = None
        if self._profile is not None:
            self._profile.end()
            self._profile = None
