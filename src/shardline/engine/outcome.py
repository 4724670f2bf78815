"""What follows from a step once its verdict is known: counters, the learning-rate schedule, and events."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from shardline.engine.notices import Notices
from shardline.engine.report import Reporter, StepFigures
from shardline.engine.trainables import Trainables
from shardline.errors import NonFiniteError
from shardline.names import ranks_text
from shardline.optim import lr
from shardline.sharding.precision import LossScaler, Precision
from shardline.sharding.step import HostVerdict
from shardline.sharding.window import Progress

__all__ = ["Outcome"]


@dataclass(frozen=True)
class _Before:
    """What the event of a step holds that the step itself changes."""

    rates: list[float | Tensor]
    loss_scale: float | None


@dataclass
class _Pending:
    """A step whose verdict the host has not read. ``undo`` takes the scheduler's step after it back."""

    ended: StepFigures
    scheduler: Any = None
    undo: Callable[[], bool] | None = None


class Outcome:
    """Reports the outcome of steps: to counters, the scheduler, and listeners."""

    def __init__(
        self,
        trainables: Trainables,
        optimizer: Optimizer | None,
        progress: Progress,
        scaler: LossScaler,
        precision: Precision,
        reporter: Reporter,
        notices: Notices,
        max_skips: int | None,
    ) -> None:
        self._trainables, self._optimizer, self._progress = trainables, optimizer, progress
        self._scaler, self._reporter, self._notices = scaler, reporter, notices
        self._scales = precision.compute is torch.float16
        self._last_epoch: int | None = None  # the scheduler's, after the last step
        self._pending: _Pending | None = None
        self._max_skips = max_skips
        self._skips = 0  # steps in a row that were skipped
        self._loss: float | None = None  # of the last step

    # -- the verdict ------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Read whether the last step was applied, and emit its event, the first time. A rank may do so alone."""
        boundary, pending = self._trainables.boundary, self._pending
        host = None if boundary is None else boundary.read()
        if host is None or pending is None:
            return
        self._pending = None
        if host.skipped and pending.undo is not None and pending.undo():
            self._last_epoch = getattr(pending.scheduler, "last_epoch", None)
        if host.refused:
            self._progress.global_steps -= 1
        else:
            self._note(host, pending.ended.step)
            self._reporter.emit(pending.ended, host, self._progress, loss_scale=self._loss_scale())

    def _note(self, host: HostVerdict, step: int) -> None:
        """Count the steps that were skipped in a row, and emit a notice about ranks without a backward."""
        self._skips = self._skips + 1 if host.skipped and not host.late else 0
        self._loss = host.loss
        if host.idle:
            self._notices.once(
                f"in step {step} {ranks_text(host.idle)} had no backward, and the others had: the gradients of these "
                f"ranks count as zeros in the average. A rank without data passes step(weight=0), and all others their "
                f"weights",
                key="no backward",
            )

    def _check_finite(self) -> None:
        """Raise if the allowed number of steps in a row was skipped. On every rank alike."""
        most, count = self._max_skips, self._skips
        if most is None or count < most:
            return
        self._skips = 0
        loss, step = self._loss, self._progress.global_steps
        was = (
            ""
            if loss is None
            else f", of a finite loss ({loss:.6g})"
            if math.isfinite(loss)
            else ", and so was the loss"
        )
        scale = f" The loss scale is {self._scaler.scale:g}." if self._scales else ""
        raise NonFiniteError(
            f"{count} steps in a row were skipped, the last is step {step}: their gradients were not finite{was}."
            f"{scale} What usually helps: a lower learning rate or a warm-up, gradient_clipping, bf16 instead of fp16, "
            f"and a look at the data of these steps. max_skipped_steps sets how many are allowed."
        )

    def finish(self) -> None:
        """No step follows: emit the events that were delayed. A rank may do so alone."""
        self.read()
        self._reporter.finish()

    def act_on_verdict(self, *, ending: bool = False) -> None:
        """Read the verdict, and do what follows from it on all ranks. Every rank calls this at the same place."""
        self.read()
        if self._trainables.boundary is not None:
            self._trainables.boundary.act_on_verdict(ending=ending)
        if ending:
            self._check_finite()

    def forget(self) -> None:
        """Forget the last step: other states were loaded."""
        if self._trainables.boundary is not None:
            self._trainables.boundary.forget()
        self._last_epoch = None

    # -- a step -----------------------------------------------------------------------------------------------------

    def before_step(self) -> _Before:
        """What the event of the step that begins now will need."""
        return _Before(self._rates(), self._loss_scale())

    def after_step(self, before: _Before, host: HostVerdict | None, scheduler: Any, lr_kwargs: dict[str, Any]) -> None:
        """A step has ended: count it, step the scheduler unless it was skipped, and act on its verdict if it is known.

        Args:
            before: what :meth:`before_step` returned before it.
            host: its verdict, or ``None`` where the host does not know it yet.
            scheduler, lr_kwargs: the user's, and the arguments of its ``step``.
        """
        self._progress.global_steps += 1
        ended = self._reporter.ended(self._progress.global_steps, lr=before.rates, loss_scale=before.loss_scale)
        self._pending = _Pending(ended)
        if host is None or not host.skipped:
            self._trainables.note_new_weights(self._notices)
            if scheduler is not None:
                self._step_scheduler(scheduler, lr_kwargs, certain=host is not None)
        if host is not None:
            self.act_on_verdict()

    def _step_scheduler(self, scheduler: Any, lr_kwargs: dict[str, Any], *, certain: bool) -> None:
        """``certain``: the update is known to be applied. Else it is assumed, and the step can be taken back."""
        if self._last_epoch not in (None, getattr(scheduler, "last_epoch", None)):
            self._notices.once(
                "the scheduler was stepped by engine.step() and elsewhere: rates change twice as often as they should. "
                "Remove scheduler.step() from the loop, or set engine.lr_scheduler = None to step it yourself."
            )
        if certain or self._optimizer is None:
            scheduler.step(**lr_kwargs)
        else:
            undo = lr.step(scheduler, self._optimizer, lr_kwargs)
            if self._pending is not None:
                self._pending.scheduler, self._pending.undo = scheduler, undo
            elif not self._progress.applied:  # the scheduler has asked the engine, which read the verdict
                undo()
        self._last_epoch = getattr(scheduler, "last_epoch", None)

    def _loss_scale(self) -> float | None:
        return self._scaler.scale if self._scales else None

    def _rates(self) -> list[float | Tensor]:
        """What ``get_lr`` gives, but copies of those that lie on a device: reading them would wait for it."""
        rates = [] if self._optimizer is None else [group["lr"] for group in self._optimizer.param_groups]
        return [
            rate.detach().clone() if isinstance(rate, Tensor) and rate.device.type != "cpu" else float(rate)
            for rate in rates
        ]
