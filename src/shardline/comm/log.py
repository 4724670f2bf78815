"""Which transitions this rank started, in which order, and how much they moved."""

from __future__ import annotations

import zlib
from array import array
from collections import Counter
from collections.abc import Sequence

__all__ = ["TransitionLog", "digest"]

_OPERATIONS = ("gather", "reduce")


class TransitionLog:
    """The started transitions of one :class:`shardline.comm.Comm`. Ranks compare digests of it at every step.

    Attributes:
        counts: transitions by (operation, unit index), since the start.
        elements: elements of the full buffers that were gathered or reduced, by operation.
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, int]] = Counter()
        self.elements: Counter[str] = Counter()
        self._units: dict[str, array[int]] = {operation: array("l") for operation in _OPERATIONS}

    def record(self, operation: str, unit: int | None, elements: int) -> None:
        """Add one transition; ``None`` for what belongs to no unit, which is not logged."""
        if unit is not None:
            self.counts[operation, unit] += 1
            self.elements[operation] += elements
            self._units[operation].append(unit)

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
