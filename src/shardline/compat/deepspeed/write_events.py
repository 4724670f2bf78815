"""``engine.monitor``: values of a script's own, handed to the sinks that the configuration asks for."""

from __future__ import annotations

from collections.abc import Iterable

from shardline.events import Events, Scalars
from shardline.sharding.window import Progress

__all__ = ["Monitor"]


class Monitor:
    """DeepSpeed's ``MonitorMaster`` as scripts use it.

    Attributes:
        enabled: whether there is a sink.
    """

    def __init__(self, events: Events, progress: Progress, *, enabled: bool) -> None:
        self._events, self._progress, self.enabled = events, progress, enabled

    def write_events(self, event_list: Iterable[tuple[str, float, int]], flush: bool = True) -> None:
        """Hand on ``(name, value, step)`` each, at the engine's own step: scripts count samples, curves count steps."""
        values = {name: float(value) for name, value, _ in event_list}
        self._events.emit(Scalars(self._progress.global_steps, values))
