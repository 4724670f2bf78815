"""A moving average of the weights, in fp32 and sharded like the masters.

    average = decay * average + (1 - decay) * weight        after every ``every``-th step

(Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging".)

It follows a step once the step's verdict is known, before the weights change again, so no step waits for a device
because of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shardline.checkpoint.engine.restore import finish_load
from shardline.engine.engine import Engine
from shardline.errors import UsageError
from shardline.events import Event, StepDone
from shardline.runtime.modes import outside_modes

__all__ = ["EMA"]


class EMA:
    """The moving average of the trained weights of ``engine``. Collective: every rank makes it alike.

    Checkpoints hold it. It goes on with the one that ``engine`` has loaded, and with one that it loads later; else it
    begins with the present weights. A parameter that is frozen keeps its average as it is; one that is trained later
    begins with its weight. Buffers are not averaged.

    Args:
        engine: made by :func:`shardline.initialize` or :func:`shardline.shard`, with an optimizer.
        decay: how much of the average stays at an update, from 0 to 1.
        every: an update follows each step whose number is a multiple of this, unless that step was skipped.
        warmup: use ``min(decay, (1 + n) / (10 + n))`` at update ``n``, counted from 0, so that early averages follow
            quickly.

    Raises:
        UsageError: if ``engine`` has no optimizer, or has such an average already; for values out of range.
        DisagreementError: if ranks give different values.
    """

    def __init__(self, engine: Engine, decay: float = 0.999, *, every: int = 1, warmup: bool = False) -> None:
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0.0 <= decay <= 1.0:
            raise UsageError(f"EMA was given decay={decay!r}; it is a number from 0 to 1, such as 0.999.")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UsageError(f"EMA was given every={every!r}; it is a number of steps, 1 or more.")
        engine.trainables.check_trains("EMA()")
        averages = engine.trainables.averages
        if averages.followed:
            raise UsageError("this engine has an EMA already. Use that one, or end it by its remove().")
        self.engine, self.decay, self.every, self.warmup = engine, float(decay), every, warmup
        engine.comm.messages.agree(
            {"decay of the EMA": self.decay, "every of the EMA": every, "warmup of the EMA": bool(warmup)}
        )
        units = engine.checkpoints.view().units
        if not averages.exist(units):
            engine.progress.average_updates = 0
        averages.begin(units)
        averages.followed = True
        engine.events.subscribe(self._see)

    @property
    def updates(self) -> int:
        """How often the average has followed the weights."""
        return self.engine.progress.average_updates

    def _see(self, event: Event) -> None:
        if isinstance(event, StepDone) and event.step % self.every == 0:
            self._follow()

    @outside_modes
    @torch.no_grad()
    def _follow(self) -> None:
        trainables, progress = self.engine.trainables, self.engine.progress
        done = progress.average_updates
        decay = min(self.decay, (1 + done) / (10 + done)) if self.warmup else self.decay
        trainables.averages.follow(trainables.layout.units, 1.0 - decay)
        progress.average_updates = done + 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the model's weights are their averages: to evaluate, generate, export. Collective.

        Afterwards every weight and master is what it was, bit by bit. Weights that are edited within edit the averages.

        Raises:
            UsageError: inside itself, inside a forward or ``gathered_parameters()``, after :meth:`remove`; and from
                whatever trains, saves or loads a checkpoint within.
        """
        trainables = self.engine.trainables
        trainables.check_trains("ema.applied()")
        if not trainables.averages.followed:
            raise UsageError("ema.applied() was called after remove().")
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @outside_modes
    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange masters and averages, and bring what the masters are now into the weights of all ranks."""
        trainables, view = self.engine.trainables, self.engine.checkpoints.view()
        if trainables.in_use:
            raise UsageError(
                "ema.applied() was entered or left inside a forward or inside gathered_parameters(). Do it outside."
            )
        trainables.hooks.unpin()
        for unit in view.units:
            unit.reshard()
        view.comm.wait_for_readers()
        trainables.averages.swap(view.units)
        finish_load(view)

    def remove(self) -> None:
        """Stop averaging, and discard the averages."""
        trainables = self.engine.trainables
        trainables.averages.check_hidden("ema.remove()")
        self.engine.events.unsubscribe(self._see)
        trainables.averages.followed = False
        if not trainables.is_closed:
            trainables.averages.drop(trainables.layout.units)
