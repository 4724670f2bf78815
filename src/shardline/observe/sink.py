"""What a sink is: something that keeps or shows the events of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from shardline.config import Config
from shardline.events import Event

__all__ = ["Run", "Sink"]


@dataclass(frozen=True)
class Run:
    """The run that a sink is opened for.

    Attributes:
        step: steps that were done before. What a sink holds of later ones did not happen: a kill took them back.
        state: what :meth:`Sink.save` returned for the checkpoint from which the run goes on; else empty.
    """

    config: Config
    step: int = 0
    state: Mapping[str, str] = field(default_factory=dict)


class Sink(Protocol):
    """Keeps or shows events. One that derives from this class has the methods that it does not need.

    A sink is opened on rank 0 when the first step is known, so that a checkpoint may be loaded before, and then gets
    the events since the engine was made. It is called in the thread of the engine; what it raises ends the training.
    """

    waits: bool = True
    """Whether it is opened with the first step. One that is to show notices at once is opened before."""

    def open(self, run: Run) -> None:
        """Begin, or go on behind ``run.step``."""

    def receive(self, event: Event) -> None:
        """An event. Values of :class:`shardline.events.StepDone` are on the host; reading them waits for nothing."""
        ...

    def save(self) -> Mapping[str, str]:
        """A checkpoint is saved: write what is left, since a process that goes on from it logs later steps only.

        Returns:
            What that process needs to go on with the same run, such as its id: short strings.
        """
        return {}

    def close(self) -> None:
        """Write what is left. :meth:`open` may follow, after a checkpoint was loaded."""
