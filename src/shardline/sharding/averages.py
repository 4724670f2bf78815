"""Moving averages of the trained weights: a buffer for each of masters, in their dtype and sharded as they are.

The average of a parameter that is frozen stands still. It is kept in full on every rank, as its optimizer state is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shardline.errors import UsageError
from shardline.sharding.bucket import Bucket
from shardline.sharding.unit import Unit

__all__ = ["Averages"]


@dataclass
class Averages:
    """The averages of one model, in any layout.

    Attributes:
        followed: whether something updates them. Those that only a checkpoint brought end with the next step.
        shown: whether they are shown instead of the weights.
        of_frozen: of frozen parameters, by first name (1-D, in storage order).
    """

    followed: bool = False
    shown: bool = False
    of_frozen: dict[str, Tensor] = field(default_factory=dict)
    _covered: list[tuple[Bucket, Tensor]] = field(default_factory=list)  # frozen weights that averages stand before

    def exist(self, units: Iterable[Unit]) -> bool:
        """Whether any parameter has one."""
        return bool(self.of_frozen) or any(
            bucket.weights.average is not None for unit in units for bucket in unit.trainable
        )

    def check_hidden(self, what: str) -> None:
        """Raise if ``what`` is called while they are shown."""
        if self.shown:
            raise UsageError(
                f"{what} was called inside ema.applied(), where the model's weights are their averages. Call it "
                f"outside."
            )

    def begin(self, units: Iterable[Unit]) -> None:
        """Start an average, with the weight as its value, for every trained parameter that has none."""
        for unit in units:
            for bucket in unit.trainable:
                if bucket.weights.average is None:
                    bucket.weights.begin_average()

    def follow(self, units: Iterable[Unit], share: float) -> None:
        """``average += share * (weight - average)``."""
        pairs = [
            (bucket.weights.average, bucket.weights.master)
            for unit in units
            for bucket in unit.trainable
            if bucket.weights.average is not None and bucket.weights.master is not None
        ]
        if pairs:
            averages, masters = zip(*pairs, strict=True)
            torch._foreach_lerp_(averages, masters, share)

    def drop(self, units: Iterable[Unit]) -> None:
        self.of_frozen.clear()
        for unit in units:
            for bucket in unit.trainable:
                bucket.weights.average = None

    # -- another layout -----------------------------------------------------------------------------------------------

    def collect(self, units: Iterable[Unit]) -> dict[str, Tensor]:
        """Every average, whole on every rank, by name. Collective."""
        found = dict(self.of_frozen)
        for unit in units:
            for bucket in unit.trainable:
                if bucket.weights.average is not None:
                    whole = bucket.weights.gather(unit.index, bucket.weights.average, unit.stage.states)
                    for entry in bucket.plan.entries:
                        found[entry.param.name] = whole[entry.offset : entry.stop].clone()
        return found

    def put(self, units: Iterable[Unit], found: dict[str, Tensor]) -> None:
        """Bring what :meth:`collect` gave into other units, which have their weights. New ones begin with those."""
        if found or self.followed:
            for unit in units:
                for bucket in unit.trainable:
                    bucket.weights.begin_average()
                    for entry in bucket.plan.entries:
                        if entry.param.name in found:
                            bucket.weights.store_average(entry, found.pop(entry.param.name))
        self.of_frozen = found

    # -- instead of the weights ---------------------------------------------------------------------------------------

    def swap(self, units: Iterable[Unit]) -> None:
        """Exchange them and the masters; a second call undoes the first. The weights of other ranks follow later.

        No rank reads the buffers of another meanwhile.
        """
        for unit in units:
            for bucket in unit.trainable:
                master, average = bucket.weights.master, bucket.weights.average
                if master is not None and average is not None:
                    before = master.clone()
                    master.copy_(average)
                    average.copy_(before)
        if self.shown:
            for bucket, before in self._covered:
                bucket.weights.resting.copy_(before)
            self._covered.clear()
        else:
            self._cover(units)
        self.shown = not self.shown

    def _cover(self, units: Iterable[Unit]) -> None:
        for unit in units:
            for bucket in unit.buckets:
                entries = [entry for entry in bucket.plan.entries if entry.param.name in self.of_frozen]
                if entries and not bucket.plan.trainable:
                    self._covered.append((bucket, bucket.weights.resting.clone()))
                    for entry in entries:
                        average = self.of_frozen[entry.param.name]
                        bucket.weights.store(entry, average.as_strided(entry.param.shape, entry.param.stride))
