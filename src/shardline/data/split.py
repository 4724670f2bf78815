"""How global batches are cut into each rank's micro-batches: pure arithmetic, and the position in it.

An epoch is one sequence of samples, cut into global batches. Only the last cut, of a global batch into pieces, knows of
ranks and micro-steps; so the sequence of global batches is the same at every world size and accumulation.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Piece", "Position", "Split", "span"]


def span(count: int, parts: int, part: int) -> range:
    """Part number ``part`` of ``count`` things in contiguous parts whose sizes differ by at most one, larger first."""
    size, larger = divmod(count, parts)
    start = part * size + min(part, larger)
    return range(start, start + size + (part < larger))


@dataclass(frozen=True)
class Position:
    """What comes next: micro-step ``micro`` of global batch ``batch`` of epoch ``epoch``, all counted from 0."""

    epoch: int
    batch: int = 0
    micro: int = 0

    def following(self, accumulation: int) -> Position:
        """The next micro-step, where a global batch has ``accumulation`` of them."""
        if self.micro + 1 < accumulation:
            return Position(self.epoch, self.batch, self.micro + 1)
        return Position(self.epoch, self.batch + 1)


@dataclass(frozen=True)
class Piece:
    """A rank's part of a global batch: ``places`` in it to draw, of which ``samples`` count (0: one, as padding)."""

    places: range
    samples: int


@dataclass(frozen=True)
class Split:
    """How a global batch becomes accumulation x world_size pieces: micro-step by micro-step, in each rank by rank."""

    global_batch: int
    accumulation: int
    world_size: int
    rank: int

    @property
    def largest(self) -> int:
        """The most samples that a piece can have."""
        return len(span(self.global_batch, self.accumulation * self.world_size, 0))

    def batches(self, length: int, drop_last: bool) -> int:
        """Global batches in an epoch of ``length`` samples: the smaller last one counts unless ``drop_last``."""
        return length // self.global_batch if drop_last else -(-length // self.global_batch)

    def piece(self, count: int, micro: int) -> Piece:
        """This rank's piece in a micro-step of a global batch that holds ``count`` >= 1 samples.

        Every rank runs every micro-step: one that gets no sample draws the last one of the global batch as padding.
        """
        places = span(count, self.accumulation * self.world_size, micro * self.world_size + self.rank)
        return Piece(places or range(count - 1, count), len(places))
