"""The typed stream of what happens in a run: the engine emits, sinks (console, timers, trackers) listen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Event", "Events", "Notice", "PhaseTimes", "StepDone", "StepSkipped"]


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimizer step was applied. It comes when that is known: on an accelerator when the next step ends.

    ``loss``, ``grad_norm`` and what is in ``lr`` may be zero-dimensional tensors that are still being computed: a sink
    reads them with ``float()`` when it shows them, so that a step that is not shown waits for nothing.
    """

    step: int
    """Number of this step, from 1."""
    loss: float | Tensor | None
    """Mean loss of the window on this rank, before scaling; None where no loss was seen."""
    lr: list[float | Tensor]
    """Learning rate of each param group, as used by this step."""
    grad_norm: float | Tensor | None
    """Global L2 norm of the gradients before clipping."""
    loss_scale: float | None
    """Loss scale of this step; None without loss scaling."""
    samples: int
    """Samples of all ranks together that went into this step."""
    seconds: float
    """Wall time since the step before."""
    read_memory: Callable[[], int]

    @property
    def memory_bytes(self) -> int:
        """Peak memory of this rank so far, in bytes: allocated on an accelerator, resident on CPU. Read when asked."""
        return self.read_memory()


@dataclass(frozen=True, slots=True)
class StepSkipped:
    """A step was not applied; the weights are those of the step before."""

    step: int
    reason: str
    """A clause that completes "step 7 skipped: ..."."""
    loss_scale_before: float | None
    loss_scale_after: float | None


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """Where the time of one step went on this rank."""

    step: int
    seconds: dict[str, float]
    """Phase (forward, backward, reduce, gather, step) to seconds; phases overlap, so they need not add up."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a user should read once."""

    message: str


Event = StepDone | StepSkipped | PhaseTimes | Notice


class Events:
    """Calls every subscribed sink with every event, in order of subscription, in the thread of the emitter.

    A sink that raises ends the training: its output must not be lost silently.
    """

    def __init__(self) -> None:
        self._sinks: tuple[Callable[[Event], None], ...] = ()

    def subscribe(self, sink: Callable[[Event], None]) -> None:
        """Let ``sink`` see every event from now on; subscribing it twice changes nothing."""
        if sink not in self._sinks:
            self._sinks = (*self._sinks, sink)

    def unsubscribe(self, sink: Callable[[Event], None]) -> None:
        """Stop calling ``sink``; one that was never subscribed is no error."""
        self._sinks = tuple(kept for kept in self._sinks if kept != sink)

    def emit(self, event: Event) -> None:
        """Hand ``event`` to the sinks that were subscribed when the call began."""
        for sink in self._sinks:
            sink(event)
