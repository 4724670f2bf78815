"""The typed stream of what happens in a run: the engine emits, sinks (console, curves, trackers) listen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CheckpointLoaded",
    "CheckpointSaved",
    "Event",
    "Events",
    "MemoryOverStep",
    "Notice",
    "PhaseTimes",
    "RunStarted",
    "Scalars",
    "StepDone",
    "StepSkipped",
]


@dataclass(frozen=True, slots=True)
class RunStarted:
    """``initialize`` is done, and what was to be resumed is loaded."""

    step: int
    """Steps that were done before."""
    config: Mapping[str, Any]
    """The resolved configuration as JSON values."""
    origins: Mapping[str, str]
    """Where each value of it came from, by dotted path; a path that is missing holds its default."""
    environment: Mapping[str, Any]
    """Versions, host, device and number of ranks."""
    units: list[dict[str, Any]]
    """A row for each unit of the model: its name, parameters and bytes on this rank."""


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimizer step was applied. It comes when that is known: on an accelerator when the next step ends.

    What is in ``lr`` may be a zero-dimensional tensor that is still being computed: a sink reads it with ``float()``
    when it shows it. All other values are on the host, and none of them was waited for.
    """

    step: int
    """Number of this step, from 1."""
    loss: float | None
    """Mean loss of the window over all ranks, before scaling; None where no loss was seen."""
    lr: list[float | Tensor]
    """Learning rate of each param group, as used by this step."""
    grad_norm: float | None
    """Global L2 norm of the gradients before clipping."""
    loss_scale: float | None
    """Loss scale of this step; None without loss scaling."""
    samples: int
    """Samples of all ranks together that went into this step."""
    seconds: float
    """Wall time since the step before."""
    read_memory: Callable[[], int]
    grad_norms: tuple[float, ...] = ()
    """The same norm of each param group; empty where there is one group, or no sink."""
    tokens: int = 0
    """Tokens of all ranks together, where the model is given integers of shape (batch, length); else 0."""
    flops: float | None = None
    """Floating-point operations of this step over all ranks, where they were counted."""
    mfu: float | None = None
    """Share of what the devices can do that went into the model's own operations, where that is known."""
    waited: tuple[float, ...] = ()
    """Seconds that each rank waited for the others since the step before, by rank; empty in a single process."""
    sent: Mapping[str, int] = field(default_factory=dict)
    """Bytes that this rank sent in this step, by operation: gather, reduce."""
    total_samples: int = 0
    """Samples of all steps so far."""
    skipped: int = 0
    """Steps that were skipped so far."""

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
    """Phase (forward, backward, reduce, step) to seconds. The rest of the step is the loop's own: data, evaluation."""


@dataclass(frozen=True, slots=True)
class MemoryOverStep:
    """Memory of this rank while one step ran. Measured in the third step of a process that keeps a run log."""

    step: int
    seconds: list[float]
    """Since the step began; of the host's clock."""
    bytes: list[int]
    """Allocated and not freed at these times."""
    phases: list[tuple[str, float, float]]
    """Name, begin and end of each phase, in the same seconds."""


@dataclass(frozen=True, slots=True)
class Scalars:
    """Values of the user's own, such as the loss on held-out data, to be shown with the engine's."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A checkpoint is complete."""

    step: int
    path: str
    seconds: float
    """From the call to the last byte."""


@dataclass(frozen=True, slots=True)
class CheckpointLoaded:
    """Training goes on from a checkpoint: steps after it did not happen."""

    step: int
    path: str
    sinks: Mapping[str, Mapping[str, str]]
    """What sinks had put into it, by name: see :meth:`shardline.observe.Sink.save`."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a user should read once."""

    message: str


Event = (
    RunStarted
    | StepDone
    | StepSkipped
    | PhaseTimes
    | MemoryOverStep
    | Scalars
    | CheckpointSaved
    | CheckpointLoaded
    | Notice
)


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
