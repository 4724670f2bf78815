"""The values of a step, which several events bring, as one row: for trackers that take a step once."""

from __future__ import annotations

from shardline.events import Event
from shardline.observe.values import values_of

__all__ = ["Pending", "Row"]

Row = tuple[int, dict[str, float]]

_STEPS = 3
"""Steps that are not complete: the times of their phases are known only later, on a device."""


class Pending:
    """Gathers values by step."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[str, float]] = {}

    def add(self, event: Event) -> list[Row]:
        """Add the values of ``event``; returns the rows that are complete."""
        step, values = values_of(event)
        if values:
            self._rows.setdefault(step, {}).update(values)
        newest = max(self._rows, default=0)
        return self.pop(newest - _STEPS + 1)

    def pop(self, before: int | None = None) -> list[Row]:
        """The rows of steps before ``before``, or all."""
        steps = sorted(step for step in self._rows if before is None or step < before)
        return [(step, self._rows.pop(step)) for step in steps]
