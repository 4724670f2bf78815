"""What this rank does, written without waiting where its peers can read it.

A status is a row of int64 cells in a mapped page. Only the main thread of its rank writes it, by plain stores: no
system call, no lock, no message.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from shardline.watch.words import CALL_CODES, Phase, label_of

__all__ = ["CHANNELS", "HEAD", "RECENT", "RING", "SIZE", "Cell", "State", "Status", "label_at", "labels_of"]

CHANNELS = 3
RING = 256
"""Labels of a channel that can be read back: more than a rank starts before it waits."""
RECENT = 64
"""Those that are compared when nothing moves any more."""


class State:
    """Of a main thread."""

    RUNNING = 0
    WAITING = 1
    ENDED = 2


class Cell:
    """What each cell holds; cell 0 is the token of the page."""

    STATE = 1
    SINCE = 2
    """When the state or phase began, in ns of the host's monotonic clock."""
    PHASE = 3
    CALL = 4
    STEP = 5
    """Steps that are done."""
    MICRO_STEP = 6
    LABEL = 7
    """The transfer that is waited for."""
    CHANNEL = 8
    NUMBER = 9
    """Its channel, and its number there; 0 where it has none."""
    THREAD = 10
    """Turns of the watching thread: it moves while the process runs, whatever the main thread does."""
    COUNT = 11
    """Transfers that were started on each channel, from 1."""


HEAD = Cell.COUNT + CHANNELS
"""Cells before the labels, which say where a rank is."""

_LABELS = 16
SIZE = _LABELS + CHANNELS * RING
"""Cells of a status: those of :class:`Cell`, and the labels of the newest transfers of each channel."""


class Status:
    """The status of this rank.

    Args:
        cells: of a page, or of ordinary memory where no other rank reads them.
    """

    def __init__(self, cells: memoryview | None = None) -> None:
        self.cells = memoryview(bytearray(8 * SIZE)).cast("q") if cells is None else cells

    # -- on the hot path ----------------------------------------------------------------------------------------------

    def start(self, channel: int, operation: int, unit: int | None) -> tuple[int, int]:
        """A transfer is about to start. Returns its number on ``channel``, from 1, and its label."""
        cells = self.cells
        label = label_of(operation, unit, cells[Cell.CALL])
        number = cells[Cell.COUNT + channel] + 1
        cells[_LABELS + channel * RING + number % RING] = label
        cells[Cell.COUNT + channel] = number
        return number, label

    def enter(self, phase: int) -> None:
        """The main thread comes to ``phase`` of the step."""
        cells = self.cells
        cells[Cell.PHASE] = phase
        cells[Cell.SINCE] = time.monotonic_ns()

    def count(self, steps: int, micro_steps: int) -> None:
        """So many steps are done, and so many micro-steps of this one."""
        cells = self.cells
        cells[Cell.STEP] = steps
        cells[Cell.MICRO_STEP] = micro_steps

    def wait(self, channel: int, number: int, label: int) -> None:
        """The main thread waits for a transfer; :meth:`go_on` follows."""
        cells = self.cells
        cells[Cell.LABEL], cells[Cell.CHANNEL], cells[Cell.NUMBER] = label, channel, number
        cells[Cell.SINCE] = time.monotonic_ns()
        cells[Cell.STATE] = State.WAITING

    def go_on(self) -> None:
        cells = self.cells
        cells[Cell.STATE] = State.RUNNING
        cells[Cell.SINCE] = time.monotonic_ns()

    # -- calls that all ranks make together ---------------------------------------------------------------------------

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        """Within it runs one of :data:`shardline.watch.words.CALLS`. One inside another counts as the outer one."""
        cells = self.cells
        if cells[Cell.CALL]:
            yield
            return
        cells[Cell.CALL] = CALL_CODES[name]
        cells[Cell.SINCE] = time.monotonic_ns()
        try:
            yield
        finally:
            cells[Cell.CALL] = 0
            cells[Cell.SINCE] = time.monotonic_ns()

    def end(self) -> None:
        """The process ends by itself."""
        self.cells[Cell.STATE] = State.ENDED

    def leave(self) -> None:
        """The main thread is back in code of the user's."""
        self.enter(Phase.OUTSIDE)


def label_at(cells: memoryview, channel: int, number: int) -> int | None:
    """The label of transfer ``number`` of the rank whose cells these are; None where it has not started it yet."""
    count = cells[Cell.COUNT + channel]
    if not count - RING < number <= count:
        return None
    return cells[_LABELS + channel * RING + number % RING]


def labels_of(cells: memoryview, head: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The labels of the newest transfers on each channel, the newest last, of the rank whose cells these are.

    Args:
        head: a copy of the first cells; what was started after it was taken does not count.
    """
    found = []
    for channel in range(CHANNELS):
        count, first = head[Cell.COUNT + channel], _LABELS + channel * RING
        numbers = range(max(1, count - RECENT + 1), count + 1)
        found.append(tuple(cells[first + number % RING] for number in numbers))
    return tuple(found)
