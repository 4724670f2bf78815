"""Which part of a bucket a buffer covers on this rank: all of it, or this rank's shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from shardline.plan import BucketPlan
from shardline.plan.placement import Placement, Stage

__all__ = ["Shard", "within"]

Range = tuple[int, int]
"""Elements of a bucket, from the first up to the second."""


@dataclass(frozen=True)
class Shard:
    """This rank's shard of a bucket: its elements from ``start`` up to ``stop``.

    Attributes:
        stage: the placements of weights, gradients and states.
    """

    plan: BucketPlan
    stage: Stage
    start: int
    stop: int

    def covered(self, placement: Placement) -> Range:
        """What a buffer in ``placement`` covers."""
        return (self.start, self.stop) if placement is Placement.SHARDED else (0, self.plan.size)

    @property
    def weights(self) -> Range:
        """What the weights at rest cover."""
        return self.covered(self.stage.weights)

    @property
    def states(self) -> Range:
        """What masters, reduced gradients and optimizer state cover."""
        return self.covered(self.stage.states)

    def own(self, buffer: Tensor) -> Tensor:
        """This rank's shard of ``buffer``, which covers either the full bucket or just the shard."""
        return buffer[self.start : self.stop] if buffer.numel() == self.plan.size else buffer


def within(spans: Sequence[Range], covered: Range) -> Iterator[Range]:
    """The parts of ``spans`` that lie in ``covered``."""
    for start, stop in spans:
        start, stop = max(start, covered[0]), min(stop, covered[1])
        if start < stop:
            yield start, stop
