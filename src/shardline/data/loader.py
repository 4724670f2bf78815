"""The loader: this rank's micro-batches of an epoch, from a position that can be saved and loaded."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, default_collate

from shardline.data.draw import Drawn, Ended, Indexed, Request, Streamed, introduce
from shardline.data.order import Order
from shardline.data.seeds import derive
from shardline.data.split import Position, Split
from shardline.errors import DataError, UsageError

__all__ = ["Loader", "length"]

logger = logging.getLogger(__name__)

_VERSION = 1
_REMEDIES = {
    "version": "Use the version of Shardline that wrote it",
    "seed": "Set the same seed",
    "global_batch": "Set the same global batch (train_batch_size)",
    "length": "Use the same dataset",
    "world_size": "A dataset that is split by rank already needs the same number of ranks",
    "order": "Use the same shuffle, sampler and torch",
}


class Loader:
    """Splits the epochs of a dataset over ranks; every rank hands out the same number of micro-batches.

    An epoch is a permutation of the dataset from (seed, epoch), cut into global batches of ``global_batch`` samples,
    the last of which may be smaller. This sequence depends on nothing else. Each global batch is cut into
    ``accumulation * world_size`` contiguous pieces whose sizes differ by at most one; a rank takes one piece per
    micro-step. Where there are fewer samples than pieces, a rank without one is handed one sample of the same global
    batch as padding, with ``weight`` 0.0, so that it can take part in the step. Nothing is dropped (``drop_last`` drops
    the smaller last global batch of each epoch) and nothing is repeated.

    **Iterating** gives the rest of the current epoch from the current position and then moves on to the next epoch. An
    iteration that was broken off is taken up by the next one where it stopped, not begun anew. To look at a batch and
    train on it all the same, load the state of before. ``set_epoch(n)`` leaves an epoch early.

    **Randomness**: ``dataset[i]`` is called with the generators of Python, NumPy (if imported) and torch's CPU seeded
    from (seed, epoch, i), ``collate_fn`` from (seed, epoch, global batch, place of the piece in it); the states outside
    are put back. Generators that a dataset makes for itself are not known here.

    **Iterable datasets** keep their own order. Each rank, and each of its workers, reads the whole stream and keeps its
    pieces, so all ranks know where it ends; hence the stream must be the same on all ranks, a global batch must fit
    into memory, and costly work belongs into ``collate_fn``, which gets this rank's samples only. A dataset that splits
    itself by ``get_worker_info()`` is told that it has the only worker. One that splits itself by *rank* must say so
    with an attribute ``sharded = True``; it needs a ``len()``, the number of samples on this rank, which must be the
    same on all ranks, and the world size cannot change in a resume. Resuming reads the stream again up to the position.

    A dataset with a method ``set_epoch(n)`` is told the epoch, in the process that draws.

    Args:
        dataset: has ``__getitem__`` and ``__len__``, or is iterable.
        global_batch: samples in a global batch, on all ranks and micro-steps together.
        micro_batch: samples in a full micro-batch, the unit of ``weight``; at least
            ``ceil(global_batch / (accumulation * world_size))``.
        accumulation: micro-steps per global batch on each rank.
        rank: this process, 0 to ``world_size - 1``.
        world_size: number of ranks.
        seed: the same on all ranks.
        shuffle: False keeps the dataset's order. Nothing to an iterable dataset or with a sampler.
        drop_last: drop the smaller last global batch.
        num_workers: as in ``torch.utils.data.DataLoader``, like the three that follow.
        pin_memory: see there.
        prefetch_factor: see there.
        persistent_workers: see there.
        collate_fn: list of samples to batch; torch's ``default_collate`` if None.
        sampler: gives the indices of an epoch, of **all** ranks, in their order, each time it is iterated. It is
            iterated under a seed from (seed, epoch), after its ``set_epoch`` if it has one.

    Attributes:
        samples: real samples in the micro-batch handed out last.
        weight: the same over ``micro_batch``: 1.0 for a full one, 0.0 for padding; 1.0 before the first.
        on_batch: called with the position of each micro-batch right before it is handed out, its ``samples`` known.
        on_error: called with a `DataError` that ends an iteration, right before it is raised, and with None once the
            next micro-batch could be drawn all the same.

    Raises:
        DataError: a dataset, a sampler or numbers that cannot be split.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        global_batch: int,
        micro_batch: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        sampler: Iterable[int] | None = None,
    ) -> None:
        self.dataset = dataset
        self.batch_size = micro_batch
        self.global_batch = global_batch
        self.seed = seed
        self.drop_last = drop_last
        self.collate_fn = collate_fn or default_collate
        self.samples = 0
        self.weight = 1.0
        self.on_batch: Callable[[Position], None] | None = None
        self.on_error: Callable[[DataError | None], None] | None = None
        self._failed = False

        iterable = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
        self._sharded = iterable and bool(getattr(dataset, "sharded", False))
        self._rank, self._world_size = rank, world_size
        _check_numbers(global_batch, micro_batch, accumulation, rank, world_size)
        _check_dataset(dataset, sampler, iterable)
        self._split = Split(global_batch, accumulation, world_size, rank)
        if self._sharded:  # what this rank reads is a small world of its own
            _check_sharded(dataset, global_batch, world_size)
            self._split = Split(global_batch // world_size, accumulation, world_size=1, rank=0)
        if self._split.largest > micro_batch:
            raise DataError(
                f"A micro-batch would hold up to {self._split.largest} samples, more than a full one of {micro_batch}: "
                f"global batch {global_batch} over {accumulation} micro-steps on {world_size} ranks. "
                f"Set the micro-batch to {self._split.largest}, take more micro-steps or a smaller global batch."
            )

        self._order = None if iterable else Order(dataset, sampler, seed, shuffle)
        self._requests = _Requests(self._order, self._split, drop_last)
        self._source = (
            Streamed(dataset, self.collate_fn, seed, self._split, drop_last)
            if iterable
            else Indexed(dataset, self.collate_fn, seed)
        )
        self._settings: dict[str, Any] = {
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "prefetch_factor": prefetch_factor,
            "persistent_workers": persistent_workers,
        }
        self._torch_loader = self._build()
        self._running: Iterator[Drawn | Ended] | None = None  # torch's iterator: has the workers and what they prefetch

        self._position = Position(epoch=0)
        self._handed: Position | None = None  # the micro-batch handed out last since the position was set
        self._size: int | None = None  # of its global batch
        self._iteration = 0  # the number of the only iteration that may go on
        self._told = False
        if self._batches(epoch=0) == 0:
            raise DataError(
                f"There is no global batch in an epoch: the dataset has {self._length(epoch=0)} samples, the global "
                f"batch is {global_batch}, drop_last {drop_last}. Add data, lower the global batch or keep the last."
            )

    @property
    def epoch(self) -> int:
        """The epoch of the current iteration, or of the next one where there is none."""
        return self._position.epoch

    @property
    def position(self) -> Position:
        """The micro-batch that will be handed out next."""
        return self._normal(self._position)

    def place(self) -> tuple[int | None, ...]:
        """What must be the same on all ranks at a step: the epoch, global batch and micro-step that come next, then the
        size of the global batch that was handed out last and a digest of the order of its epoch, where there are any.
        """
        here, handed = self.position, self._handed
        crc = self._order.crc(handed.epoch) if self._order is not None and handed is not None else None
        return here.epoch, here.batch, here.micro, self._size, crc

    def __len__(self) -> int:
        """Micro-batches in the whole current epoch on this rank, wherever in it the position is.

        Raises:
            TypeError: an iterable dataset without ``len()``.
        """
        batches = self._batches(self.epoch)
        if batches is None:
            raise TypeError(f"The length of an epoch is not known: {type(self.dataset).__name__} has no len().")
        return batches * self._split.accumulation

    def __iter__(self) -> Iterator[Any]:
        """The micro-batches of this rank from the position to the end of the epoch, as ``collate_fn`` returns them.

        Raises:
            DataError: a stream that ends before the position or, if sharded, not at its ``len()``.
            UsageError: this iterator is used after a newer one, a jump to another position or ``close()``.
        """
        self._leave()
        mine = self._iteration
        self._position = start = self.position
        if self._handed is not None and start != Position(start.epoch):
            self._tell_once(start)
        self._requests.start = start
        self._running = iter(self._torch_loader)
        over = Ended(self._length(start.epoch) or 0)
        try:
            while not isinstance(item := next(self._running, over), Ended):
                self._hand_out(item)
                yield item.batch
                if self._iteration != mine:
                    raise UsageError(
                        "This iteration over the loader is over: since then the loader was iterated again, closed, or "
                        "set to another position. Go on with a new iter(loader)."
                    )
            self._check_end(start, item.total)
        except DataError as error:
            self._tell(error)
            raise
        finally:
            if self._iteration == mine:
                self._leave()
        nothing_left = self._position == start
        self._position = Position(start.epoch + 1)
        if nothing_left and self._handed is not None:  # an iteration was left exactly at the end of its stream
            yield from self

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; nothing changes if it is the current one, so that a loaded position stays."""
        if epoch == self.epoch:
            return
        left = self.position
        if left != Position(left.epoch) and self._rank == 0:
            of = self._batches(left.epoch)
            logger.warning(
                "set_epoch(%d) leaves epoch %d after %d%s global batches; its other samples are not used.",
                epoch, left.epoch, left.batch, f" of {of}" if of else "",
            )  # fmt: skip
        self._jump(Position(epoch))

    def state_dict(self, *, stepped: bool = True, at: Position | None = None) -> dict[str, Any]:
        """The position as a value for JSON; it counts what was handed out, not what workers prefetched.

        It is the start of a global batch, so that any world size and accumulation can go on from it: inside an
        accumulation window it is the start of that window, which a resume replays.

        Args:
            stepped: False where the global batch of the micro-batch handed out last was not stepped yet, although it
                may be handed out whole: the state is then the start of it.
            at: an earlier `position` whose state is asked for.
        """
        if at is not None:
            return self._state(at)
        return self._state(self.position if stepped or self._handed is None else self._handed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved position, also at another world size, accumulation or number of workers.

        Raises:
            DataError: the state was saved with another seed, global batch, order or length of the dataset: samples
                would be lost or repeated. Nothing is changed then. ``set_epoch`` can begin an epoch all the same.
        """
        try:
            position = Position(operator.index(state["epoch"]), operator.index(state["batch"]))
        except (KeyError, TypeError) as error:
            raise DataError(f"This is not the position of a loader ({error!r}): {dict(state)}.") from error
        here = self._state(position)
        for name, remedy in _REMEDIES.items():
            if state.get(name) != here[name]:
                raise DataError(
                    f"The saved position does not fit this loader: its {name} is {state.get(name)!r}, here it is "
                    f"{here[name]!r}. Going on from it would lose samples and repeat others. {remedy}, or begin "
                    f"an epoch with loader.set_epoch(n)."
                )
        batches = self._batches(position.epoch)
        if position.epoch < 0 or position.batch < 0 or (self._order and batches and position.batch > batches):
            raise DataError(
                f"The saved position is global batch {position.batch} of epoch {position.epoch}, but an epoch has "
                f"{batches} global batches. Use the same drop_last, or begin an epoch with loader.set_epoch(n)."
            )
        self._jump(self._normal(position))

    def close(self) -> None:
        """End the worker processes and drop what they prefetched. The position stays; iterating starts them anew."""
        self._leave()
        self._stop()
        self._source.close()
        self._torch_loader = self._build()

    def _build(self) -> DataLoader[Drawn | Ended]:
        return DataLoader(
            self._source,
            batch_size=None,  # one request is one micro-batch
            sampler=self._requests,
            collate_fn=_unchanged,
            worker_init_fn=introduce,
            generator=torch.Generator().manual_seed(derive(self.seed)),  # else each iter() draws from the outer state
            **self._settings,
        )

    def _leave(self) -> None:
        self._iteration += 1
        if not self._settings["persistent_workers"]:
            self._stop()

    def _stop(self) -> None:
        """End the workers now, even where a traceback of theirs still refers to torch's iterator."""
        running: Any = self._running
        if hasattr(running, "_shutdown_workers"):
            running._shutdown_workers()
        self._running = None

    def _jump(self, position: Position) -> None:
        self._leave()
        self._position = position
        self._handed = self._size = None
        self.samples, self.weight = 0, 1.0

    def _hand_out(self, item: Drawn) -> None:
        here = self._position
        if self._sharded and here.batch >= (self._batches(here.epoch) or 0):
            raise DataError(
                f"The dataset {type(self.dataset).__name__} yields more than the {len(self.dataset)} samples of its "
                f"len() in epoch {here.epoch} on rank {self._rank}, so this rank would wait for the others for ever. "
                "A dataset that is split by rank must yield len() samples on each."
            )
        if self._failed:
            self._tell(None)
        self._position = here.following(self._split.accumulation)
        self._handed, self._size = here, item.size
        self.samples = item.samples
        self.weight = item.samples / self.batch_size
        if self.on_batch is not None:
            self.on_batch(here)

    def _tell(self, error: DataError | None) -> None:
        self._failed = error is not None
        if self.on_error is not None:
            self.on_error(error)

    def _check_end(self, start: Position, total: int) -> None:
        """Look at the number of samples of a whole epoch when it ended."""
        name = type(self.dataset).__name__
        if self._sharded and total != len(self.dataset):
            raise DataError(
                f"The dataset {name} ended after {total} samples in epoch {start.epoch} on rank {self._rank}, but its "
                f"len() is {len(self.dataset)}, so the other ranks would wait for this one for ever. "
                "A dataset that is split by rank must yield len() samples on each."
            )
        before = max(start.batch, 1)  # so many global batches must have been there
        size = self._split.global_batch
        least = before * size if self.drop_last else (before - 1) * size + 1
        if total < least:
            raise DataError(
                f"The stream of {name} ended after {total} samples in epoch {start.epoch}; at least {least} were "
                f"expected (global batch {size}, position {start.batch}, drop_last {self.drop_last}). It must yield "
                "its samples each time it is iterated; a generator, for one, can be used up only once."
            )
        if self._order is None and hasattr(self.dataset, "__len__") and total != len(self.dataset) and self._rank == 0:
            logger.warning(
                "The stream of %s ended after %d samples in epoch %d, but its len() is %d. If it should have gone on: "
                "a next() without a default in its __next__ ends it, too.",
                name, total, start.epoch, len(self.dataset),
            )  # fmt: skip

    def _length(self, epoch: int) -> int | None:
        """Samples in an epoch, as far as known; those of this rank in a sharded dataset."""
        if self._order is not None:
            return self._order.length(epoch)
        return len(self.dataset) if hasattr(self.dataset, "__len__") else None

    def _batches(self, epoch: int) -> int | None:
        length = self._length(epoch)
        return None if length is None else self._split.batches(length, self.drop_last)

    def _normal(self, position: Position) -> Position:
        """The end of an epoch is the start of the next. Where a stream ends only reading it tells."""
        if self._order is not None and position.batch >= (self._batches(position.epoch) or 0):
            return Position(position.epoch + 1)
        return position

    def _state(self, position: Position) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "epoch": position.epoch,
            "batch": position.batch,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "length": self._length(position.epoch) if self._order or self._sharded else None,
            "world_size": self._world_size if self._sharded else None,
            "order": self._order.digest(position.epoch) if self._order else None,
        }

    def _tell_once(self, start: Position) -> None:
        if not self._told and self._rank == 0:
            self._told = True
            logger.warning(
                "An iteration over the loader was broken off; the next one goes on from micro-step %d of global batch "
                "%d of epoch %d. To go elsewhere: set_epoch(n) or load_state_dict(state) before it. (Said once.)",
                start.micro, start.batch, start.epoch,
            )  # fmt: skip


def length(dataset: Any) -> int | str:
    """The ``len()`` of a dataset, or in a word why there is none: what ranks compare before they load anything."""
    if dataset is None:
        return "no dataset"
    if not hasattr(dataset, "__len__"):
        return "unknown"
    try:
        return len(dataset)
    except Exception as error:  # the loader meets it again, on every rank if it is the same on all
        return f"{type(error).__name__}: {error}"


class _Requests:
    """The sampler of torch's loader: the micro-batches of this rank from ``start`` to the end of the epoch."""

    def __init__(self, order: Order | None, split: Split, drop_last: bool) -> None:
        self.order = order
        self.split = split
        self.drop_last = drop_last
        self.start = Position(epoch=0)

    def __iter__(self) -> Iterator[Request]:
        return self._streamed(self.start) if self.order is None else self._indexed(self.start, self.order)

    def _streamed(self, position: Position) -> Iterator[Request]:
        while True:
            yield Request(position)
            position = position.following(self.split.accumulation)

    def _indexed(self, position: Position, order: Order) -> Iterator[Request]:
        indices, size = order.indices(position.epoch), self.split.global_batch
        while position.batch < self.split.batches(len(indices), self.drop_last):
            batch = indices[position.batch * size : (position.batch + 1) * size]
            piece = self.split.piece(len(batch), position.micro)
            mine = batch[piece.places.start : piece.places.stop].tolist()
            yield Request(position, mine, piece.samples, piece.places.start, len(batch))
            position = position.following(self.split.accumulation)


def _unchanged(item: Any) -> Any:
    return item


def _check_numbers(global_batch: int, micro_batch: int, accumulation: int, rank: int, world_size: int) -> None:
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


def _check_dataset(dataset: Any, sampler: Iterable[int] | None, iterable: bool) -> None:
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


def _check_sharded(dataset: Any, global_batch: int, world_size: int) -> None:
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
