"""The end of an accumulation window: ranks compare what they did, and the update is applied, skipped or refused."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from shardline.alike import Alike, Statement
from shardline.comm import digest
from shardline.config import Config
from shardline.errors import DisagreementError, UsageError
from shardline.precision import LossScaler
from shardline.schedule import Schedule
from shardline.step import HostVerdict, Row, Update, Verdict

__all__ = ["Boundary", "Progress", "Window", "no_backward"]


def no_backward() -> UsageError:
    return UsageError(
        "step() was called without a backward since the last step, on any rank. Call engine.backward(loss) first."
    )


@dataclass
class Window:
    """What one accumulation window has seen so far on this rank.

    Gradients are sums. What they are divided by is known at the end: ``weight``, over the configured accumulation by
    which each backward was divided already, summed over the ranks.
    """

    steps: int = 0  # micro-steps
    weight: float = 0.0  # of the micro-steps, or as the caller gave it
    weighted: bool = False  # the caller gave one
    shares: float = 0.0  # what the batches of all backwards hold, in full ones
    batches: int = 0  # backwards that followed a forward
    samples: int = 0
    loss: Tensor | None = None
    backwards: int = 0
    unreduced: bool = False  # gradients of the last backward are on this rank only
    handed: bool = False  # the engine's loader has handed out a batch for it
    begun: bool = False  # a forward with gradients has drawn random numbers and updated buffers
    fresh: bool = False  # ...and no backward has followed yet

    def add_backward(self, share: float) -> None:
        """A backward begins, of a batch that holds ``share`` of a full one."""
        self.backwards += 1
        self.shares += share
        self.batches += self.fresh
        self.fresh = False

    def add_step(self, share: float, weight: float | None, samples: int) -> None:
        """A micro-step is over: its batch holds ``share`` of a full one, or counts as the caller's ``weight`` says."""
        self.steps += 1
        self.weight += share if weight is None else weight
        self.weighted = self.weighted or weight is not None
        self.samples += samples

    def sum_up(self, accumulation: int) -> int:
        """The caller says that the window ends: its gradient is the sum of what its backwards gave, over the ranks.

        Returns:
            How many micro-steps it seems to hold that no call of ``step`` has counted.
        """
        if not self.weighted:
            self.weight = accumulation * (self.shares / self.backwards if self.backwards else 1.0)
        uncounted = max(min(self.batches, accumulation) - self.steps, 0)
        self.steps += uncounted
        return uncounted

    def add_loss(self, loss: Tensor) -> None:
        self.loss = loss if self.loss is None else self.loss + loss

    @property
    def touched(self) -> bool:
        """Whether anything of it has happened."""
        return bool(self.handed or self.begun or self.backwards or self.steps)


@dataclass
class Progress:
    """How far the training of one engine has come, over all ranks, and what its last step did.

    Attributes:
        global_steps: optimizer steps, skipped ones included.
        micro_steps: calls of ``step()``.
        global_samples: samples of all ranks together that the steps have seen.
        skipped_steps: steps whose gradients were not finite.
        norm: of the last step's averaged gradients before clipping.
        applied: whether the last call of ``step()`` changed the weights.
        leaving: whether some rank was asked to save and end.
    """

    global_steps: int = 0
    micro_steps: int = 0
    global_samples: int = 0
    skipped_steps: int = 0
    norm: Tensor | float | None = None
    applied: bool = False
    leaving: bool = False


class Boundary:
    """Ends windows for one layout of the model. Where reading a verdict would wait, it is read one step late."""

    def __init__(
        self,
        update: Update,
        schedule: Schedule,
        scaler: LossScaler,
        config: Config,
        progress: Progress,
        alike: Alike,
    ) -> None:
        self.update, self.schedule, self.scaler = update, schedule, scaler
        self.alike = alike
        self.units, self.comm = update.units, update.comm
        self.progress = progress
        self._clip = config.gradient_clipping
        self._unit_weight = config.gradient_accumulation_steps
        self._check = config.bf16.check_grad_overflow or not config.bf16.enabled
        # Reading a verdict waits for the device: done at once where that is free (CPU) or needed (the loss scale).
        self._reads_at_once = update.device.type == "cpu" or scaler.dynamic
        self._pending: tuple[Verdict, Statement] | None = None  # of the step before, with what it is about
        self._known: HostVerdict | None = None  # the same verdict, once somebody has read it
        self._log: dict[str, array[int]] = {}

    def end(
        self,
        window: Window,
        *,
        leaving: bool,
        before: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> HostVerdict | None:
        """Reduce what is left, judge, and apply the update unless the verdict says not to.

        Args:
            window: what this rank has seen.
            leaving: whether this rank was asked to save and end.
            before, after: called around the optimizer's step; see :meth:`Update.apply`.

        Returns:
            The verdict, or None where the host does not know it yet; then :meth:`read` brings it.

        Raises:
            UsageError: if no rank had a backward.
            DisagreementError: if ranks did not issue the same collectives, or differ in what must be the same on all.
                No weight was changed in any of these cases.
        """
        for unit in self.units:
            unit.adopt(keep=False)
        if window.unreduced:
            self.schedule.reduce_now(reversed(self.units))
        left, statement = self.schedule.end_step(), self.alike.state()
        verdict, host = self._judge(window, left, statement, leaving, hooked=before is not None)
        late = host is not None and host.late
        if late:
            self._reduce_late()
            verdict, host = self._judge(window, left, statement, leaving, hooked=before is not None)
        if host is not None:
            if host.diverged:
                raise self._refusal()
            if not host.alike:
                raise self.alike.refusal(statement, self.comm.exchange, "this step")
            if not host.backwards:
                raise no_backward()
            self.scaler.update(overflow=host.skipped)
            self._count(host)
            self._adopt(host, late=late)
        for work in [work for unit in self.units for work in unit.share_grads()]:
            work.wait()
        self.update.apply(verdict, host, self._clip, before, after)
        self._pending = (verdict, statement) if host is None else None
        self.progress.norm = verdict.norm if host is None else host.norm
        self.progress.applied = host is None or not host.skipped
        return host

    def _judge(
        self, window: Window, left: bool, statement: Statement, leaving: bool, *, hooked: bool
    ) -> tuple[Verdict, HostVerdict | None]:
        """One small collective: what the ranks' gradients, weights and doings say together."""
        self.schedule.finish_reductions()
        for unit in self.units:
            unit.arrive()
        self._log = self.comm.take_log()
        row = Row(
            squares=self.update.squares(),
            weight=window.weight,
            left=left,
            late=sum(unit.has_partial() for unit in self.units),
            samples=window.samples,
            backwards=window.backwards,
            leaving=leaving,
            transitions=digest(*self._log.values()),
            alike=statement.digest,
            on_device=statement.on_device,
        )
        verdict = Verdict.of(
            self.comm.rows(row.stack(self.update.device)),
            unit_weight=self._unit_weight,
            loss_scale=self.scaler.scale,
            clip=self._clip,
            check=self._check,
        )
        verdict.send()
        return verdict, verdict.read() if self._reads_at_once or self.update.needs_host(hooked) else None

    def read(self) -> HostVerdict | None:
        """Learn what became of the step before, if nobody has yet. A rank may do this alone: it moves nothing that
        ranks share.

        Returns:
            The verdict, the first time that it is read.
        """
        if self._pending is None or self._known is not None:
            return None
        self._known = host = self._pending[0].read()
        if host.refused:
            self.progress.applied = False  # and settle says why
        else:
            self._count(host)
        return host

    @property
    def refused(self) -> bool:
        """Whether the step before was refused and :meth:`settle` has not said so yet."""
        return self._known is not None and self._known.refused

    def settle(self) -> None:
        """Take the consequences of the step before. Collective: every rank does this before the same step or save.

        Raises:
            DisagreementError: as :meth:`end`; that step was not applied.
        """
        if self._pending is None:
            return
        self.read()
        host, (_, statement) = self._known, self._pending
        self._pending = self._known = None
        if host is None or host.diverged:
            raise DisagreementError(
                "ranks did not issue the same collectives in the step before, which was therefore not applied. Give "
                "every rank the same sequence of forwards; run forwards that differ inside gathered_parameters()."
            )
        if not host.alike:
            raise self.alike.refusal(statement, self.comm.exchange, "the step before")
        self._adopt(host, late=host.late)

    def forget(self) -> None:
        """The step before does not count any more: other states were loaded."""
        self._pending = self._known = None
        self.progress.norm, self.progress.applied = None, False

    def _count(self, host: HostVerdict) -> None:
        self.progress.applied = not host.skipped
        self.progress.skipped_steps += host.skipped
        self.progress.global_samples += host.samples

    def _adopt(self, host: HostVerdict, *, late: bool) -> None:
        """What ranks decide together. ``late``: some rank had late gradients."""
        self.progress.leaving = self.progress.leaving or host.leaving
        if host.left or late:  # some rank did not do what was agreed, or cannot: all hear of it
            untrusted = self.comm.exchange(sorted(self.schedule.untrusted))
            self.schedule.distrust({index for indices in untrusted for index in indices})

    def _reduce_late(self) -> None:
        """A second round for gradients that came after their unit was reduced, on every rank alike."""
        late = [unit.index for unit in self.units if unit.has_partial()]
        everywhere = {index for indices in self.comm.exchange(late) for index in indices}
        self.schedule.reduce_now(self.units[index] for index in sorted(everywhere))

    def _refusal(self) -> DisagreementError:
        """Ranks exchanged the wrong ranges: name both sides, before any weight was touched."""
        names = [unit.name for unit in self.units]
        logs = self.comm.exchange({operation: list(units) for operation, units in self._log.items()})
        differing = ((operation, rank) for rank, log in enumerate(logs) for operation in log
                     if log[operation] != logs[0][operation])  # fmt: skip
        operation, rank = next(differing)
        ours, theirs = logs[0][operation], logs[rank][operation]
        spot = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        spot = min(len(ours), len(theirs)) if spot is None else spot
        here, there = (repr(names[each[spot]]) if spot < len(each) else "none" for each in (ours, theirs))
        return DisagreementError(
            f"ranks did not use the same units in the same order, so this step was not applied: as {operation} "
            f"{spot + 1} since the last step, rank 0 had unit {here} and rank {rank} unit {there}. Give every rank the "
            f"same sequence of forwards; run forwards that differ by rank inside engine.gathered_parameters()."
        )
