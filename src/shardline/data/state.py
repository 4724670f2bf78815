"""Where a loader is in its data, as a value that can be saved and loaded."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from shardline.data.order import SampleOrder, length_of
from shardline.data.split import Position, Split
from shardline.errors import DataError

__all__ = ["LoaderState"]

_VERSION = 1
_REMEDIES = {
    "version": "Use the version of Shardline that wrote it",
    "seed": "Set the same seed",
    "global_batch": "Set the same global batch (train_batch_size)",
    "length": "Use the same dataset",
    "world_size": "A dataset that is split by rank already needs the same number of ranks",
    "order": "Use the same shuffle, sampler and torch",
}


class LoaderState:
    """What comes next, what was handed out last, and how long the epochs are.

    Args:
        dataset: the user's.
        order: of an indexed dataset.
        split: of this rank.
        sharded: whether the dataset is split by rank already.
        world_size: number of ranks.

    Attributes:
        at: the micro-batch to hand out next; past the end of the epoch where that has been handed out.
        handed: the micro-batch handed out last since the position was set.
        size: of its global batch.
    """

    def __init__(
        self,
        dataset: Any,
        order: SampleOrder | None,
        split: Split,
        *,
        seed: int,
        global_batch: int,
        drop_last: bool,
        sharded: bool,
        world_size: int,
    ) -> None:
        self.dataset, self.order, self.split = dataset, order, split
        self.seed, self.global_batch, self.drop_last = seed, global_batch, drop_last
        self.sharded, self.world_size = sharded, world_size
        self.at = Position(epoch=0)
        self.handed: Position | None = None
        self.size: int | None = None

    @property
    def position(self) -> Position:
        """The micro-batch that will be handed out next."""
        return self._normal(self.at)

    def advance(self, size: int) -> Position:
        """The next micro-batch is handed out, of a global batch of ``size``; returns its position."""
        here = self.at
        self.at = here.following(self.split.accumulation)
        self.handed, self.size = here, size
        return here

    def jump(self, position: Position) -> None:
        """Move to another position."""
        self.at = position
        self.handed = self.size = None

    def place(self) -> tuple[int | None, ...]:
        """What must be the same on all ranks at a step: see :meth:`shardline.data.loader.Loader.place`."""
        here, handed = self.position, self.handed
        crc = self.order.crc(handed.epoch) if self.order is not None and handed is not None else None
        return here.epoch, here.batch, here.micro, self.size, crc

    def length(self, epoch: int) -> int | None:
        """Samples in an epoch, as far as known; those of this rank in a sharded dataset."""
        if self.order is not None:
            return self.order.length(epoch)
        return length_of(self.dataset) if hasattr(self.dataset, "__len__") else None

    def batches(self, epoch: int) -> int | None:
        """Global batches in an epoch, as far as known."""
        length = self.length(epoch)
        return None if length is None else self.split.batches(length, self.drop_last)

    def to_dict(self, position: Position) -> dict[str, Any]:
        """The start of the global batch at ``position`` as a value for JSON."""
        return {
            "version": _VERSION,
            "epoch": position.epoch,
            "batch": position.batch,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "length": self.length(position.epoch) if self.order or self.sharded else None,
            "world_size": self.world_size if self.sharded else None,
            "order": self.order.digest(position.epoch) if self.order else None,
        }

    def parse(self, state: Mapping[str, Any]) -> Position:
        """The position that :meth:`to_dict` of a loader like this one has saved.

        Raises:
            DataError: if it was saved with another seed, global batch, order or length of the dataset.
        """
        try:
            position = Position(operator.index(state["epoch"]), operator.index(state["batch"]))
        except (KeyError, TypeError) as error:
            raise DataError(f"This is not the position of a loader ({error!r}): {dict(state)}.") from error
        here = self.to_dict(position)
        for name, remedy in _REMEDIES.items():
            if state.get(name) != here[name]:
                raise DataError(
                    f"The saved position does not fit this loader: its {name} is {state.get(name)!r}, here it is "
                    f"{here[name]!r}. Going on from it would lose samples and repeat others. {remedy}, or begin "
                    f"an epoch with loader.set_epoch(n)."
                )
        batches = self.batches(position.epoch)
        if position.epoch < 0 or position.batch < 0 or (self.order and batches and position.batch > batches):
            raise DataError(
                f"The saved position is global batch {position.batch} of epoch {position.epoch}, but an epoch has "
                f"{batches} global batches. Use the same drop_last, or begin an epoch with loader.set_epoch(n)."
            )
        return self._normal(position)

    def _normal(self, position: Position) -> Position:
        """The end of an epoch is the start of the next. The end of a stream is known only once it is read."""
        if self.order is not None and position.batch >= (self.batches(position.epoch) or 0):
            return Position(position.epoch + 1)
        return position
