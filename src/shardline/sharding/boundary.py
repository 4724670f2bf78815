"""The end of an accumulation window: ranks compare what they did, and the update is applied, skipped or refused."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass

import torch

from shardline.comm import digest
from shardline.config import Config
from shardline.errors import DisagreementError, UsageError
from shardline.sharding.consistency import ConsistencyCheck, Fingerprint
from shardline.sharding.precision import LossScaler
from shardline.sharding.schedule import Schedule
from shardline.sharding.step import HostVerdict, StepReport, Update, Verdict
from shardline.sharding.window import Gradients, Progress, Window

__all__ = ["Boundary", "no_backward"]


def no_backward(*, before: bool = False) -> UsageError:
    """``before``: the error is about the step before the one that raises it."""
    called = "the step() before this one was called" if before else "step() was called"
    return UsageError(
        f"{called} without a backward since the last step, on any rank. Call engine.backward(loss) first."
    )


@dataclass
class JudgedStep:
    """A step between its verdict and the consequences that ranks take together.

    Attributes:
        fingerprint: of this rank's values that must be the same on all ranks.
        log: the collectives that this rank issued before it.
        late: some rank had late gradients, which a second round has reduced.
        host: the host's part of the verdict, once it was read.
        counted: whether :class:`Progress` counts it.
    """

    verdict: Verdict
    fingerprint: Fingerprint
    log: dict[str, array[int]]
    late: bool
    host: HostVerdict | None = None
    counted: bool = False


class Boundary:
    """Ends windows for one layout of the model.

    A step is ended, then *read* (by one rank: was it applied?), then *acted on* (by all ranks together). If reading
    would wait for the device, both happen when the next step ends. The first step of a layout is always read at once:
    late gradients mostly occur in it, and a second round can reduce them only in a step that is read at once.

    Attributes:
        reads_at_once: whether every verdict is read when its step ends: where that does not wait (on a CPU), or where
            the loss scale needs it.
    """

    def __init__(
        self,
        update: Update,
        schedule: Schedule,
        scaler: LossScaler,
        config: Config,
        progress: Progress,
        consistency: ConsistencyCheck,
    ) -> None:
        self.update, self.schedule, self.scaler = update, schedule, scaler
        self.progress, self.consistency = progress, consistency
        self._clip = config.gradient_clipping
        self._check = config.bf16.check_grad_overflow or not config.bf16.enabled or config.debug.find_nonfinite
        self.reads_at_once = update.device.type == "cpu" or scaler.dynamic
        self._observed = config.is_observed
        update.comm.log.timed = self._observed
        self._first = True
        self._was_late = False  # some rank had late gradients in this window, which :meth:`complete` has reduced
        self._last: JudgedStep | None = None  # not acted on yet

    def end(
        self,
        window: Window,
        *,
        exit_requested: bool,
        at_once: bool = False,
        before: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> HostVerdict | None:
        """Reduce what is left, compare reports, and apply the update unless the verdict is to skip or refuse it.

        The step before was acted on.

        Args:
            window: what this rank has seen.
            exit_requested: whether this rank was asked to save and end.
            at_once: whether the host must know the verdict when this returns.
            before, after: called around the optimizer's step; see :meth:`Update.apply`.

        Returns:
            The verdict, or None where the host does not know it yet. In both cases :meth:`read` counts it.

        Raises:
            UsageError: if no rank had a backward.
            DisagreementError: if ranks did not issue the same collectives, or differ in what must be the same on all.
                No weight was changed in any of these cases.
        """
        self.progress.applied = False
        for unit in self.update.units:
            unit.adopt_edits(restorable=False)
        self._reduce_rest(window)
        left_order, fingerprint = self.schedule.end_step(), self.consistency.fingerprint()
        hooked = before is not None or after is not None
        reads = at_once or self._first or self.reads_at_once or self.update.needs_host(hooked)
        judged = self._judge(window, left_order, fingerprint, exit_requested, reads=reads, late=self._was_late)
        self._was_late = False
        if judged.host is not None and judged.host.late:
            self._reduce_late()
            judged = self._judge(window, left_order, fingerprint, exit_requested, reads=reads, late=True)
        verdict, host = judged.verdict, judged.host
        if host is not None:
            self._refuse(judged, host, "this step")
            self.scaler.update(overflow=host.skipped)
        for work in [work for unit in self.update.units for work in unit.gather_grads()]:
            work.wait()
        self.update.apply(verdict, host, self._clip, before, after)
        self._first, self._last = False, judged
        self.progress.norm = verdict.norm if host is None else host.norm
        self.progress.applied = True
        return host

    def _reduce_rest(self, window: Window) -> None:
        """Reduce the gradients that no backward has reduced."""
        if window.gradients is Gradients.LOCAL:
            self.schedule.reduce_now(reversed(self.update.units))
            window.note_reduced()

    def complete(self, window: Window) -> None:
        """Reduce everything that the window holds, before it ends. Collective.

        Late gradients are looked for only if that does not wait for a device, or in the first step of a layout.
        Otherwise :meth:`end` finds them, and the step is skipped.
        """
        self._reduce_rest(window)
        self.schedule.finish_reductions()
        units, comm = self.update.units, self.update.comm
        for unit in units:
            unit.wait_for_host()
        if comm.shard.size > 1 and (self._first or self.reads_at_once):
            late = torch.tensor([float(sum(unit.has_partial() for unit in units))], dtype=torch.float64)
            if bool(comm.all_gather_vector(late.to(self.update.device)).any()):
                self._reduce_late()
                self.schedule.finish_reductions()
                self._was_late = True

    def _judge(
        self,
        window: Window,
        left_order: bool,
        fingerprint: Fingerprint,
        exit_requested: bool,
        *,
        reads: bool,
        late: bool = False,
    ) -> JudgedStep:
        """One small collective: the ranks compare their reports."""
        self.schedule.finish_reductions()
        for unit in self.update.units:
            unit.wait_for_host()
        log = self.update.comm.log.drain()
        report = StepReport(
            squares=self.update.squares(),
            weight=window.weight,
            left_order=left_order,
            late=sum(unit.has_partial() for unit in self.update.units),
            samples=window.samples,
            backwards=window.backwards,
            exit_requested=exit_requested,
            transitions=digest(*log.values()),
            fingerprint=fingerprint.digest,
            on_device=fingerprint.on_device,
            loss=None if window.loss is None else window.loss.double() * window.accumulation,
            counted=0.0 if window.loss is None else window.counted,
            tokens=window.tokens,
            waited=self.update.comm.log.take_waited(),
            groups=self.update.squares_of_groups() if self._observed else None,
        )
        verdict = Verdict.of(
            self.update.comm.all_gather_vector(report.stack(self.update.device)),
            accumulation=window.accumulation,
            loss_scale=self.scaler.scale,
            clip=self._clip,
            check=self._check,
        )
        verdict.send()
        return JudgedStep(
            verdict, fingerprint, log, late, verdict.read(self.update.comm.waiting_for_device) if reads else None
        )

    def read(self) -> HostVerdict | None:
        """Read whether the last step was applied. A rank may do so alone: nothing changes that ranks share.

        Returns:
            The verdict, the first time; afterwards None.
        """
        judged, progress = self._last, self.progress
        if judged is None or judged.counted:
            return None
        judged.counted = True
        judged.host = host = judged.host or judged.verdict.read(self.update.comm.waiting_for_device)
        progress.norm = host.norm
        progress.applied = progress.applied and not host.skipped
        if not host.refused:
            progress.skipped_steps += host.skipped
            progress.global_samples += host.samples
        return host

    @property
    def refused(self) -> bool:
        """Whether the last step is known to be refused, and :meth:`act_on_verdict` has not raised its error yet."""
        return self._last is not None and self._last.host is not None and self._last.host.refused

    def act_on_verdict(self, *, ending: bool = False) -> None:
        """Do what follows from the last step, which was read. Collective: every rank calls this before the same step or
        save.

        Args:
            ending: whether :meth:`end` of the next step follows.

        Raises:
            UsageError, DisagreementError: as :meth:`end`; that step was not applied.
        """
        judged, self._last = self._last, None
        if judged is not None and judged.host is not None:
            self._refuse(judged, judged.host, "the step before")
            self._act_on(judged.host, late=judged.late or judged.host.late, ending=ending)

    def forget(self) -> None:
        """Forget the last step: other states were loaded."""
        self._last = None
        self.progress.norm, self.progress.applied = None, False

    def _refuse(self, judged: JudgedStep, host: HostVerdict, what: str) -> None:
        """Raise if the verdict refuses the step, which messages call ``what``. On every rank alike."""
        if host.diverged:
            raise self._differing_orders(judged.log, what)
        if not host.consistent:
            raise self.consistency.error(judged.fingerprint, self.update.comm.messages.exchange, what)
        if not host.backwards:
            raise no_backward(before=what == "the step before")

    def _act_on(self, host: HostVerdict, *, late: bool, ending: bool) -> None:
        """What follows from the verdict on all ranks. ``late``: some rank had late gradients."""
        self.progress.exit_requested = self.progress.exit_requested or host.exit_requested
        if host.left_order or late:
            wrong = self.update.comm.messages.exchange(sorted(self.schedule.wrong_hints))
            self.schedule.negotiate_next({index for indices in wrong for index in indices}, ending=ending)

    def _reduce_late(self) -> None:
        """The second round: reduce gradients that came after their unit was reduced. On every rank alike."""
        late = [unit.index for unit in self.update.units if unit.has_partial()]
        everywhere = {index for indices in self.update.comm.messages.exchange(late) for index in indices}
        self.schedule.reduce_now(self.update.units[index] for index in sorted(everywhere))

    def _differing_orders(self, log: dict[str, array[int]], what: str) -> DisagreementError:
        """The error where ranks issued different collectives, and so exchanged wrong ranges: it names both sides."""
        names = [unit.name for unit in self.update.units]
        logs = self.update.comm.messages.exchange({operation: list(units) for operation, units in log.items()})
        differing = ((operation, rank) for rank, theirs in enumerate(logs) for operation in theirs
                     if theirs[operation] != logs[0][operation])  # fmt: skip
        operation, rank = next(differing)
        ours, theirs = logs[0][operation], logs[rank][operation]
        spot = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        spot = min(len(ours), len(theirs)) if spot is None else spot
        here, there = (repr(names[each[spot]]) if spot < len(each) else "none" for each in (ours, theirs))
        return DisagreementError(
            f"ranks did not use the same units in the same order, so {what} was not applied: as {operation} "
            f"{spot + 1} since the one before it, rank 0 had unit {here} and rank {rank} unit {there}. Give every "
            f"rank the same sequence of forwards; run forwards that differ by rank inside engine.gathered_parameters()."
        )
