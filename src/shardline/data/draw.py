"""Draw and collate the samples of a micro-batch under known random states; this is what runs in worker processes.

A sample is drawn with Python's, NumPy's (where it is imported) and torch's CPU generator seeded from (seed, epoch,
index), the collate function with a seed from (seed, epoch, global batch, place in it). So augmentation does not depend
on workers or world size, and a resumed run draws what the first would have drawn. The states outside are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch.utils.data import Dataset, get_worker_info

from shardline.data.order import length_of
from shardline.data.seeds import derive, outer_states_kept, seed_all
from shardline.data.split import Position, Split
from shardline.errors import DataError, shown
from shardline.runtime.ending import end_with_parent

__all__ = ["Drawn", "Indexed", "Request", "StreamEnd", "Streamed", "introduce"]

Collate = Callable[[list[Any]], Any]


class Request(NamedTuple):
    """A micro-batch to draw. A stream finds the rest itself; else ``indices``, how many of them count, the place of the
    first in its global batch, and the size of that."""

    position: Position
    indices: Sequence[int] = ()
    samples: int = 0
    place: int = 0
    size: int = 0


class Drawn(NamedTuple):  # tuples, because torch pins what is inside them
    """A collated micro-batch, the number of real samples in it (0 for padding), and in its global batch."""

    samples: int
    size: int
    batch: Any


class StreamEnd(NamedTuple):
    """The answer of a stream that ended, after ``total`` samples, before the micro-batch that was asked for."""

    total: int


class _Source(Dataset[Drawn | StreamEnd]):
    """A map from requests to micro-batches over a user's dataset."""

    def __init__(self, dataset: Any, collate: Collate, seed: int) -> None:
        self.dataset = dataset
        self.collate = collate
        self.seed = seed
        self.epoch: int | None = None
        self.from_main_thread = False
        """Whether the main thread starts the workers, which end with the thread that started them."""

    def __getitem__(self, request: Request) -> Drawn | StreamEnd:
        try:
            with outer_states_kept():
                return self.draw(request)
        except StopIteration as error:  # it would end the iteration, and so the epoch
            where = " ".join(getattr(error, "__notes__", ()))
            raise DataError(
                f"The dataset {type(self.dataset).__name__} or its collate_fn raised StopIteration, as next() does on "
                f"an iterator that has ended. Give next() a default, or raise another error. {where}".rstrip()
            ) from error

    def draw(self, request: Request) -> Drawn | StreamEnd:
        raise NotImplementedError

    def close(self) -> None:
        """Release what is kept between micro-batches."""
        self.epoch = None

    def begin(self, epoch: int) -> None:
        """Call the dataset's ``set_epoch``, if it has one."""
        if epoch != self.epoch:
            self.epoch = epoch
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)

    def finish(self, position: Position, samples: list[Any], counted: int, place: int, size: int) -> Drawn:
        """Collate samples whose first has this place in its global batch of ``size``."""
        seed_all(derive(self.seed, position.epoch, position.batch, place))
        return Drawn(counted, size, self.collate(samples))


class Indexed(_Source):
    """Micro-batches of a dataset with ``__getitem__``."""

    def __init__(self, dataset: Any, collate: Collate, seed: int, rank: int) -> None:
        super().__init__(dataset, collate, seed)
        self.rank = rank

    def draw(self, request: Request) -> Drawn:
        epoch = request.position.epoch
        self.begin(epoch)
        samples = []
        for index in request.indices:
            seed_all(derive(self.seed, epoch, index))
            try:
                samples.append(self.dataset[index])
            except IndexError as error:
                raise DataError(
                    f"The dataset {type(self.dataset).__name__} has no sample {index}, which epoch {epoch} draws on "
                    f"rank {self.rank} (IndexError: {shown(error, 200)}). Its len() is {_length(self.dataset)}: "
                    f"is that too many, or does the sampler give indices beyond it?"
                ) from error
            except Exception as error:
                error.add_note(f"Raised while drawing sample {index} of epoch {epoch}.")
                raise
        return self.finish(request.position, samples, request.samples, request.place, request.size)


class Streamed(_Source):
    """Micro-batches of a dataset that can only be iterated.

    The process that draws reads the whole stream, one global batch at a time, and keeps its own piece. So each rank
    knows, without a message, where the stream ends and how many samples the last global batch has.
    """

    def __init__(self, dataset: Any, collate: Collate, seed: int, split: Split, drop_last: bool) -> None:
        super().__init__(dataset, collate, seed)
        self.split = split
        self.least = split.global_batch if drop_last else 1
        self.stream: Iterator[Any] | None = None
        self.held: list[Any] = []  # the global batch number `batch`
        self.batch = -1
        self.total = 0

    def draw(self, request: Request) -> Drawn | StreamEnd:
        position = request.position
        if position.epoch != self.epoch or position.batch < self.batch:
            self.rewind(position.epoch)
        while self.batch < position.batch:
            self.read_global_batch(position.epoch)
        if len(self.held) < self.least:
            return StreamEnd(self.total)
        piece = self.split.piece(len(self.held), position.micro)
        samples = [self.held[place] for place in piece.places]
        return self.finish(position, samples, piece.samples, piece.places.start, len(self.held))

    def close(self) -> None:
        super().close()
        self.stream, self.held = None, []

    def rewind(self, epoch: int) -> None:
        self.begin(epoch)
        seed_all(derive(self.seed, epoch))
        self.stream = iter(self.dataset)
        self.held, self.batch, self.total = [], -1, 0

    def read_global_batch(self, epoch: int) -> None:
        self.held = []
        self.batch += 1
        while self.stream is not None and len(self.held) < self.split.global_batch:
            seed_all(derive(self.seed, epoch, self.total))
            try:
                self.held.append(next(self.stream))
                self.total += 1
            except StopIteration:
                self.stream = None  # it is not asked again: some iterators would start again
            except Exception as error:
                self.epoch = None  # a generator that raised would now seem to have ended: read again if asked again
                error.add_note(f"Raised while drawing sample {self.total} of the stream in epoch {epoch}.")
                raise


def _length(dataset: Any) -> int | str:
    return length_of(dataset) if hasattr(dataset, "__len__") else "missing"


def introduce(worker: int) -> None:
    """Tell the user's dataset in worker processes what torch's get_worker_info() would say without Shardline between.

    A stream that splits itself by worker would leave each worker a part, and this rank's piece would be cut from it:
    samples would be lost. It sees only one worker, so that it yields the whole stream.
    """
    info = get_worker_info()
    if info is None:
        raise AssertionError("this is not a worker process of a loader")
    source: Any = info.dataset
    if source.from_main_thread:
        end_with_parent()  # torch's own watch does not see a parent that was killed while a sample is drawn
    known = {"dataset": source.dataset}
    if isinstance(source, Streamed):
        known |= {"id": 0, "num_workers": 1, "seed": derive(source.seed)}
    for name, value in known.items():
        object.__setattr__(info, name, value)  # it is frozen
