"""Which transitions this rank started, in which order, how much they moved, and how long it waited for others."""

from __future__ import annotations

import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from shardline.runtime.clock import Moment, now, seconds_between

__all__ = ["TransitionLog", "digest"]

_OPERATIONS = ("gather", "reduce")


class TransitionLog:
    """The started transitions of one :class:`shardline.comm.Comm`. Ranks compare digests of it at every step.

    Attributes:
        counts: transitions by (operation, unit index), since the start.
        elements: elements of the full buffers that were gathered or reduced, by operation.
        bytes: the same in bytes.
        waited: seconds since :meth:`take_waited` in which the host did nothing but wait for other ranks.
        timed: whether rows that a device exchanges are timed in its stream.
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, int]] = Counter()
        self.elements: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.waited = 0.0
        self.timed = False
        self._rows: list[tuple[Moment, Moment]] = []
        self._units: dict[str, array[int]] = {operation: array("l") for operation in _OPERATIONS}

    def record(self, operation: str, unit: int | None, elements: int, itemsize: int) -> None:
        """Add one transition; ``None`` for what belongs to no unit, which is not logged."""
        if unit is not None:
            self.bytes[operation] += elements * itemsize
            self.counts[operation, unit] += 1
            self.elements[operation] += elements
            self._units[operation].append(unit)

    @contextmanager
    def waiting(self, device: torch.device) -> Iterator[None]:
        """Count the time within as waiting: the host's where the tensors are its own, else that of the stream."""
        if device.type != "cpu" and not self.timed:
            yield
            return
        begin = now(device)
        yield
        self._rows.append((begin, now(device)))

    def take_waited(self) -> float:
        """Seconds of waiting since the last call, as far as the device has come."""
        waited, self.waited = self.waited, 0.0
        while self._rows and (seconds := seconds_between(*self._rows[0])) is not None:
            self._rows.pop(0)
            waited += seconds
        return waited

    def drain(self) -> dict[str, array[int]]:
        """The units of each operation since the last call, in the order in which they were started."""
        units, self._units = self._units, {operation: array("l") for operation in _OPERATIONS}
        return units


def digest(*sequences: Sequence[int] | array[int]) -> int:
    """A 32-bit digest of sequences of integers; exact in a float64."""
    found = 0
    for sequence in sequences:
        found = zlib.crc32(array("l", [len(sequence), *sequence]).tobytes(), found)
    return found
