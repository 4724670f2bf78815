"""The sources of a window's gradients: the engine's backwards, those of others, and what was set by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from shardline.engine.batch_tracker import BatchTracker
from shardline.engine.loss_checks import LossChecks
from shardline.engine.report import Reporter
from shardline.engine.trainables import Trainables
from shardline.runtime.modes import leave_modes, outside_modes, untraced
from shardline.sharding.hooks import watch_root
from shardline.sharding.precision import LossScaler
from shardline.sharding.scaling import PLAIN, multiplied, multiplied_by
from shardline.sharding.window import Window

__all__ = ["Backwards"]

_IN_USE: WeakValueDictionary[int, Backwards] = WeakValueDictionary()
"""Those of all engines of this process that are in use, in the order in which all ranks made them."""


class Backwards:
    """The backwards of one engine.

    Attributes:
        no_sync: whether gradients are only added up on this rank for now.
    """

    def __init__(
        self,
        window: Window,
        trainables: Trainables,
        batches: BatchTracker,
        loss_checks: LossChecks,
        scaler: LossScaler,
        reporter: Reporter,
        *,
        every_time: bool,
    ) -> None:
        self.no_sync = False
        self._window, self._trainables, self._batches = window, trainables, batches
        self._loss_checks, self._scaler, self._reporter = loss_checks, scaler, reporter
        self._every_time = every_time  # the stage reduces in every micro-step
        _IN_USE[id(self)] = self

    def close(self) -> None:
        """Leave the backwards of other engines."""
        _IN_USE.pop(id(self), None)

    @contextmanager
    def running(self, factor: float, *, by_accumulation: bool) -> Iterator[None]:
        """Within it a backward runs whose loss is multiplied by ``factor``; its graph may hold other engines.

        :meth:`end` follows.

        Args:
            factor: see :func:`shardline.sharding.scaling.multiplied`.
            by_accumulation: the same.
        """
        engines = list(_IN_USE.values())
        if factor != 1.0:  # an earlier gradient in .grad would be collected with the factor of this backward
            for each in engines:
                each.collect_unseen()
        self._begin(factor=1.0)
        with multiplied(factor, by_accumulation=by_accumulation):
            try:
                with self._reporter.phase("backward"):
                    yield
            except BaseException:
                self._trainables.schedule.abort_backward()
                raise
            for each in engines:
                if each is not self:
                    each.collect_unseen()

    def scaled(self, loss: Tensor) -> Tensor:
        """``loss`` times the loss scale, in fp32 where it is fp16: to begin a plain ``.backward()`` with."""
        factor, running = self._scaler.scale, ExitStack()

        def begin() -> None:
            for each in list(_IN_USE.values()):
                each.collect_unseen()
            running.enter_context(multiplied(factor, by_accumulation=True))

        def end() -> None:
            for each in list(_IN_USE.values()):
                if not each._trainables.schedule.in_backward:
                    each.collect_unseen()
            running.close()

        scaled = (loss.float() if loss.dtype is torch.float16 else loss) * factor
        watch_root(scaled, begin, end)
        return scaled

    @outside_modes
    def _begin(self, *, factor: float) -> None:
        reducing = self._reduces_now()
        self._window.begin_backward(self._batches.share(), reducing=reducing)
        self._trainables.schedule.begin_backward(reducing=reducing, factor=factor / self._window.divided_by)

    def _reduces_now(self) -> bool:
        return not self.no_sync and (self._every_time or self._window.at_boundary)

    @untraced
    def end(self) -> None:
        """A backward is over: reduce what is left, and guard the gradients until the step."""
        with leave_modes():
            with self._reporter.phase("reduce"):
                self._trainables.schedule.end_backward()
            if (boundary := self._trainables.boundary) is not None:
                self._trainables.bring_states()  # here, where activations are gone
                boundary.update.guard_grads(scale_is_out=self._loss_checks.grad_scale is not None)

    @outside_modes
    def enter_foreign(self) -> bool:
        """A backward that this engine did not begin reaches its outputs. Returns whether it is the first output."""
        self._trainables.check_trains("loss.backward()")
        if self._trainables.schedule.in_backward:
            return False
        self._begin(factor=self._foreign_factor())
        return True

    def _foreign_factor(self) -> float:
        """The factor on gradients of a backward that this engine did not begin, when they are collected.

        It makes them those of ``engine.backward``: this engine's own factor over the factor that was applied, which is
        that of the engine that began the backward, or 1.0 for a plain ``loss.backward()``. A quotient of loss scales is
        a power of two, so it is exact.
        """
        applied, by_accumulation = multiplied_by()
        if (applied, by_accumulation) == PLAIN:
            self._loss_checks.see_plain_backward(self._scaler.scale)
        own = self._batches.share() / (self._window.accumulation if by_accumulation else 1) * self._scaler.scale
        return own / applied if applied else 0.0

    @outside_modes
    def collect_unseen(self) -> bool:
        """Collect gradients of backwards without a hook (through ``model.encode()``), or that were set by hand.

        Returns whether there were any.
        """
        trainables = self._trainables
        if trainables.boundary is None or not any(unit.has_uncollected() for unit in trainables.layout.units):
            return False
        self._begin(factor=self._foreign_factor())
        self.end()
        return True

    def join(self) -> None:
        """Take part, without a backward on this rank, in the reductions of the ranks that had one."""
        reducing = self._reduces_now()
        self._window.join(reducing=reducing)
        self._trainables.schedule.begin_backward(reducing=reducing, factor=1.0)
        self.end()

    @outside_modes
    def complete(self) -> bool:
        """Reduce everything that this window holds, before it ends. Returns whether there was anything. Collective."""
        boundary = self._trainables.check_trains("using gradients")
        collected = self.collect_unseen()
        if self._window.is_complete:
            return False
        if not collected and not self._window.backwards and boundary.update.comm.data.size > 1:
            self.join()
        boundary.complete(self._window)
        self._window.is_complete = True
        return True

    def discard(self, *, steps: int = 0) -> None:
        """Discard what the window has accumulated, and restart it ``steps`` micro-steps in."""
        self._trainables.drop_gradients()
        self._window.restart(steps=steps)
