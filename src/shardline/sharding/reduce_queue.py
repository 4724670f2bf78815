"""The reductions of one backward that are in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from shardline.sharding.unit import Unit

__all__ = ["ReduceQueue"]


class ReduceQueue:
    """Reductions in the order in which they start. Those in flight are together no larger than the largest unit.

    Args:
        on_host: whether waiting for a reduction keeps the host. On an accelerator it keeps the stream.

    Attributes:
        issued: how many reductions this backward has started.
        forced: units that were reduced before this rank had their gradients, since an order said so: that these come
            late says nothing against the hints of the unit.
    """

    def __init__(self, units: Sequence[Unit], *, on_host: bool) -> None:
        self._largest = max((unit.plan.numel for unit in units), default=0)
        self._on_host = on_host
        self._in_flight: deque[tuple[int, Unit]] = deque()
        self.issued = 0
        self.forced: set[int] = set()

    def begin(self) -> None:
        """A backward begins. What an earlier one that failed has left is in flight on all ranks, or on none."""
        self._in_flight = deque((-1, unit) for _, unit in self._in_flight)
        self.issued = 0
        self.forced.clear()

    def admit(self, unit: Unit, wait: Callable[[int, Unit], None] | None = None) -> None:
        """Make room for the reduction of ``unit``, which starts next.

        ``wait(number, unit)`` is called before the wait for an earlier one.
        """
        while self._in_flight and sum(each.plan.numel for _, each in self._in_flight) + unit.plan.numel > self._largest:
            number, oldest = self._in_flight.popleft()
            if wait is not None:
                wait(number, oldest)
            oldest.wait_for_reduce()
        self._in_flight.append((self.issued, unit))
        self.issued += 1

    def collect_finished(self) -> None:
        """Free what finished reductions held, before the next gradients need memory."""
        if self._on_host:  # on an accelerator the stream would wait, and not compute meanwhile
            while self._in_flight and self._in_flight[0][1].has_reduced():
                self._in_flight.popleft()[1].wait_for_reduce()

    def finish(self) -> None:
        """Return when every reduction is complete."""
        while self._in_flight:
            self._in_flight.popleft()[1].wait_for_reduce()
