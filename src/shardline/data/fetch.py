"""Fetches micro-batches through torch's ``DataLoader``: which ones, by which workers, and when those end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from shardline.data.draw import Drawn, Indexed, Request, Streamed, StreamEnd, introduce
from shardline.data.order import SampleOrder
from shardline.data.seeds import derive
from shardline.data.split import Position, Split

__all__ = ["Fetcher"]


class Fetcher:
    """The worker processes of one loader, and the one iteration that may use them.

    Args:
        source: draws what a request asks for.
        order: of an indexed dataset.
        split: which part of a global batch is this rank's.
        drop_last: whether the smaller last global batch of an epoch is left out.
        settings: of torch's loader: workers, pinning, prefetching.
    """

    def __init__(
        self,
        source: Indexed | Streamed,
        order: SampleOrder | None,
        split: Split,
        drop_last: bool,
        settings: dict[str, Any],
    ) -> None:
        self._source, self._settings = source, settings
        self._requests = _Requests(order, split, drop_last)
        self._loader = self._build()
        self._running: Iterator[Drawn | StreamEnd] | None = (
            None  # torch's iterator: has the workers and what they prefetch
        )
        self.iteration = 0
        """The number of the only iteration that may go on."""

    def start(self, position: Position) -> Iterator[Drawn | StreamEnd]:
        """Begin to fetch, from ``position`` to the end of its epoch."""
        self._requests.start = position
        self._source.from_main_thread = threading.current_thread() is threading.main_thread()
        self._running = iter(self._loader)
        return self._running

    def end_iteration(self) -> None:
        """End the current iteration; its workers end, unless they are persistent."""
        self.iteration += 1
        if not self._settings["persistent_workers"]:
            self._stop()

    def close(self) -> None:
        """End the worker processes and drop what they prefetched; :meth:`start` starts new ones."""
        self.end_iteration()
        self._stop()
        self._source.close()
        self._loader = self._build()

    def _build(self) -> DataLoader[Drawn | StreamEnd]:
        return DataLoader(
            self._source,
            batch_size=None,  # one request is one micro-batch
            sampler=self._requests,
            collate_fn=_unchanged,
            worker_init_fn=introduce,
            # Else each iter() draws from the global generator.
            generator=torch.Generator().manual_seed(derive(self._source.seed)),
            **self._settings,
        )

    def _stop(self) -> None:
        """End the workers now, even where a traceback of theirs still refers to torch's iterator."""
        running: Any = self._running
        if hasattr(running, "_shutdown_workers"):
            running._shutdown_workers()
        self._running = None


class _Requests:
    """The sampler of torch's loader: the micro-batches of this rank from ``start`` to the end of the epoch."""

    def __init__(self, order: SampleOrder | None, split: Split, drop_last: bool) -> None:
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

    def _indexed(self, position: Position, order: SampleOrder) -> Iterator[Request]:
        indices, size = order.indices(position.epoch), self.split.global_batch
        while position.batch < self.split.batches(len(indices), self.drop_last):
            batch = indices[position.batch * size : (position.batch + 1) * size]
            piece = self.split.piece(len(batch), position.micro)
            mine = batch[piece.places.start : piece.places.stop].tolist()
            yield Request(position, mine, piece.samples, piece.places.start, len(batch))
            position = position.following(self.split.accumulation)


def _unchanged(item: Any) -> Any:
    return item
