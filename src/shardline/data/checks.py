"""What a loader refuses: numbers and datasets that cannot be split, and streams that end too early or late."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch.utils.data import DistributedSampler

from shardline.data.split import Position, Split
from shardline.data.state import LoaderState
from shardline.errors import DataError

__all__ = ["check_dataset", "check_end", "check_fits", "check_numbers", "check_sharded"]

logger = logging.getLogger(__name__)


def check_numbers(global_batch: int, micro_batch: int, accumulation: int, rank: int, world_size: int) -> None:
    counts = {
        "global_batch": global_batch,
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "world_size": world_size,
    }
    for name, count in counts.items():
        if count < 1:
            raise DataError(f"The loader's {name} is {count}; it must be at least 1.")
    if not 0 <= rank < world_size:
        raise DataError(f"The loader's rank is {rank}; with a world size of {world_size} it is 0 to {world_size - 1}.")


def check_dataset(dataset: Any, sampler: Iterable[int] | None, iterable: bool) -> None:
    name = type(dataset).__name__
    if iterable and not hasattr(dataset, "__iter__"):
        raise DataError(f"The dataset {name} has neither __getitem__ nor __iter__. Give it one of them.")
    if iterable and sampler is not None:
        raise DataError(f"The dataset {name} is iterable: a sampler cannot choose from it. Leave the sampler out.")
    if not iterable and sampler is None and not hasattr(dataset, "__len__"):
        raise DataError(f"The dataset {name} has no __len__, so an epoch has no end. Add one, or give a sampler.")
    if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        raise DataError(
            f"A {type(sampler).__name__} over {sampler.num_replicas} ranks was given, but the loader itself splits the "
            "order over ranks. Give a sampler of the whole dataset, or none."
        )


def check_sharded(dataset: Any, global_batch: int, world_size: int) -> None:
    name = type(dataset).__name__
    if not hasattr(dataset, "__len__"):
        raise DataError(
            f"The dataset {name} is split by rank already (sharded = True) but has no __len__. Give it one, the number "
            "of samples on each rank, the same on all: else a rank cannot know that others have ended."
        )
    if global_batch % world_size:
        raise DataError(
            f"The dataset {name} is split by rank already (sharded = True), so the global batch must be a multiple of "
            f"the world size; they are {global_batch} and {world_size}."
        )


def check_fits(split: Split, micro_batch: int, world_size: int, global_batch: int) -> None:
    """See that no micro-batch holds more samples than a full one."""
    if split.largest > micro_batch:
        raise DataError(
            f"A micro-batch would hold up to {split.largest} samples, more than a full one of {micro_batch}: "
            f"global batch {global_batch} over {split.accumulation} micro-steps on {world_size} ranks. "
            f"Set the micro-batch to {split.largest}, take more micro-steps or a smaller global batch."
        )


def check_end(state: LoaderState, start: Position, total: int, rank: int) -> None:
    """See that an iteration from ``start`` ended where it should, after ``total`` samples of the epoch."""
    dataset, name = state.dataset, type(state.dataset).__name__
    if state.sharded and total != len(dataset):
        raise DataError(
            f"The dataset {name} ended after {total} samples in epoch {start.epoch} on rank {rank}, but its "
            f"len() is {len(dataset)}, so the other ranks would wait for this one without end. "
            "A dataset that is split by rank must yield len() samples on each."
        )
    before = max(start.batch, 1)  # so many global batches must have been there
    size = state.split.global_batch
    least = before * size if state.drop_last else (before - 1) * size + 1
    if total < least:
        raise DataError(
            f"The stream of {name} ended after {total} samples in epoch {start.epoch}; at least {least} were "
            f"expected (global batch {size}, position {start.batch}, drop_last {state.drop_last}). It must yield "
            "its samples each time it is iterated; a generator, for one, can be used up only once."
        )
    if state.order is None and hasattr(dataset, "__len__") and total != len(dataset) and rank == 0:
        logger.warning(
            "The stream of %s ended after %d samples in epoch %d, but its len() is %d. If it should have gone on: "
            "a next() without a default in its __next__ ends it, too.",
            name, total, start.epoch, len(dataset),
        )  # fmt: skip
