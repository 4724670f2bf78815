"""The loader: this rank's micro-batches of an epoch, from a position that can be saved and loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset, default_collate

from shardline.data.checks import check_dataset, check_end, check_fits, check_numbers, check_sharded
from shardline.data.draw import Drawn, Indexed, Streamed, StreamEnd
from shardline.data.fetch import Fetcher
from shardline.data.order import SampleOrder
from shardline.data.split import Position, Split
from shardline.data.state import LoaderState
from shardline.errors import DataError, UsageError

__all__ = ["Loader", "length"]

logger = logging.getLogger(__name__)


class Loader:
    """Splits the epochs of a dataset over ranks; every rank hands out the same number of micro-batches.

    An epoch is a permutation of the dataset from (seed, epoch), cut into global batches of ``global_batch`` samples,
    the last of which may be smaller. This sequence depends on nothing else. Each global batch is cut into
    ``accumulation * world_size`` contiguous pieces whose sizes differ by at most one; a rank takes one piece per
    micro-step. Where there are fewer samples than pieces, a rank without one is handed one sample of the same global
    batch as padding, with ``weight`` 0.0, so that it can take part in the step. Nothing is dropped (``drop_last`` drops
    the smaller last global batch of each epoch) and nothing is repeated.

    **Iterating** gives the rest of the current epoch from the current position and then moves on to the next epoch. An
    interrupted iteration is continued by the next one from where it stopped. To look at a batch and train on it
    later, load the state from before. ``set_epoch(n)`` leaves an epoch early.

    **Randomness**: ``dataset[i]`` is called with the generators of Python, NumPy (if imported) and torch's CPU seeded
    from (seed, epoch, i), ``collate_fn`` from (seed, epoch, global batch, place of the piece in it); the states outside
    are put back. Generators that a dataset makes for itself are not known here.

    **Iterable datasets** keep their own order. Each rank, and each of its workers, reads the whole stream and keeps its
    pieces, so all ranks know where it ends. So the stream must be the same on all ranks, a global batch must fit
    into memory, and costly work belongs in ``collate_fn``, which gets this rank's samples only. A dataset that splits
    itself by ``get_worker_info()`` sees only one worker. One that splits itself by *rank* must say so
    with an attribute ``sharded = True``; it needs a ``len()``, the number of samples on this rank, which must be the
    same on all ranks, and the world size cannot change in a resume. Resuming reads the stream again up to the position.

    A dataset's ``set_epoch(n)``, if it has one, is called with the epoch, in the process that draws.

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
        self._failed = self._told = False
        self._rank = rank

        iterable = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
        sharded = iterable and bool(getattr(dataset, "sharded", False))
        check_numbers(global_batch, micro_batch, accumulation, rank, world_size)
        check_dataset(dataset, sampler, iterable)
        split = _split(dataset, global_batch, accumulation, rank, world_size, sharded=sharded)
        check_fits(split, micro_batch, world_size, global_batch)
        order = None if iterable else SampleOrder(dataset, sampler, seed, shuffle)
        source = (
            Streamed(dataset, self.collate_fn, seed, split, drop_last)
            if iterable
            else Indexed(dataset, self.collate_fn, seed, rank)
        )
        settings: dict[str, Any] = {
            "num_workers": num_workers, "pin_memory": pin_memory,
            "prefetch_factor": prefetch_factor, "persistent_workers": persistent_workers,
        }  # fmt: skip
        self._fetcher = Fetcher(source, order, split, drop_last, settings)
        self._state = LoaderState(
            dataset, order, split,
            seed=seed, global_batch=global_batch, drop_last=drop_last, sharded=sharded, world_size=world_size,
        )  # fmt: skip
        if self._state.batches(epoch=0) == 0:
            raise DataError(
                f"There is no global batch in an epoch: the dataset has {self._state.length(epoch=0)} samples, the "
                f"global batch is {global_batch}, drop_last {drop_last}. Add data, lower the global batch or keep the "
                f"last."
            )

    @property
    def epoch(self) -> int:
        """The epoch of the current iteration, or of the next one where there is none."""
        return self._state.at.epoch

    @property
    def position(self) -> Position:
        """The micro-batch that will be handed out next."""
        return self._state.position

    def place(self) -> tuple[int | None, ...]:
        """What must be the same on all ranks at a step: the epoch, global batch and micro-step that come next, then the
        size of the global batch that was handed out last and a digest of the order of its epoch, where there are any.
        """
        return self._state.place()

    def __len__(self) -> int:
        """Micro-batches in the whole current epoch on this rank, wherever in it the position is.

        Raises:
            TypeError: an iterable dataset without ``len()``.
        """
        batches = self._state.batches(self.epoch)
        if batches is None:
            raise TypeError(f"The length of an epoch is not known: {type(self.dataset).__name__} has no len().")
        return batches * self._state.split.accumulation

    def __iter__(self) -> Iterator[Any]:
        """The micro-batches of this rank from the position to the end of the epoch, as ``collate_fn`` returns them.

        Raises:
            DataError: a stream that ends before the position or, if sharded, not at its ``len()``.
            UsageError: this iterator is used after a newer one, a jump to another position or ``close()``.
        """
        fetcher, state = self._fetcher, self._state
        fetcher.end_iteration()
        mine = fetcher.iteration
        state.at = start = self.position
        if state.handed is not None and start != Position(start.epoch):
            self._tell_once(start)
        running = fetcher.start(start)
        over = StreamEnd(state.length(start.epoch) or 0)
        try:
            while not isinstance(item := next(running, over), StreamEnd):
                self._hand_out(item)
                yield item.batch
                if fetcher.iteration != mine:
                    raise UsageError(
                        "This iteration over the loader is over: since then the loader was iterated again, closed, or "
                        "set to another position. Go on with a new iter(loader)."
                    )
            check_end(state, start, item.total, self._rank)
        except DataError as error:
            self._report(error)
            raise
        finally:
            if fetcher.iteration == mine:
                fetcher.end_iteration()
        nothing_left = state.at == start
        state.at = Position(start.epoch + 1)
        if nothing_left and state.handed is not None:  # an iteration was left exactly at the end of its stream
            yield from self

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; nothing changes if it is the current one, so that a loaded position stays."""
        if epoch == self.epoch:
            return
        left = self.position
        if left != Position(left.epoch) and self._rank == 0:
            of = self._state.batches(left.epoch)
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
            return self._state.to_dict(at)
        handed = self._state.handed
        return self._state.to_dict(self.position if stepped or handed is None else handed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved position, also at another world size, accumulation or number of workers.

        Raises:
            DataError: the state was saved with another seed, global batch, order or length of the dataset: samples
                would be lost or repeated. Nothing is changed then. ``set_epoch`` can begin an epoch all the same.
        """
        self._jump(self._state.parse(state))

    def close(self) -> None:
        """End the worker processes and drop what they prefetched. The position stays; iterating starts new ones."""
        self._fetcher.close()

    def _jump(self, position: Position) -> None:
        self._fetcher.end_iteration()
        self._state.jump(position)
        self.samples, self.weight = 0, 1.0

    def _hand_out(self, item: Drawn) -> None:
        state, here = self._state, self._state.at
        if state.sharded and here.batch >= (state.batches(here.epoch) or 0):
            raise DataError(
                f"The dataset {type(self.dataset).__name__} yields more than the {len(self.dataset)} samples of its "
                f"len() in epoch {here.epoch} on rank {self._rank}, so this rank would wait without end. "
                "A dataset that is split by rank must yield len() samples on each."
            )
        if self._failed:
            self._report(None)
        state.advance(item.size)
        self.samples = item.samples
        self.weight = item.samples / self.batch_size
        if self.on_batch is not None:
            self.on_batch(here)

    def _report(self, error: DataError | None) -> None:
        self._failed = error is not None
        if self.on_error is not None:
            self.on_error(error)

    def _tell_once(self, start: Position) -> None:
        if not self._told and self._rank == 0:
            self._told = True
            logger.warning(
                "An iteration over the loader was interrupted; the next one goes on from micro-step %d of global batch "
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


def _split(dataset: Any, global_batch: int, accumulation: int, rank: int, world_size: int, *, sharded: bool) -> Split:
    if not sharded:
        return Split(global_batch, accumulation, world_size, rank)
    check_sharded(dataset, global_batch, world_size)
    # this rank reads its own part, as a single process would
    return Split(global_batch // world_size, accumulation, world_size=1, rank=0)
