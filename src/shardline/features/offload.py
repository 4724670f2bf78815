"""Host memory as the place of masters, reduced gradients and optimizer state, while the model computes on a device.

A shard of reduced gradients is copied to the host when its sum is complete, on a stream of its own, while backward goes
on. Weights are copied to the device in their own dtype, in order with what the device does next. Nothing else is
copied.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable

import torch
from torch import Tensor

from shardline.config import Config
from shardline.runtime.pinned import empty_pinned
from shardline.sharding.buffer import owns_its_memory

__all__ = ["Offload"]

_UNDER_WAY = 2
"""Shards on their way down at a time: each is device memory until it has arrived."""


class Offload:
    """The copies between ``source`` and the host.

    Attributes:
        device: where the states are.
        counts: copies by (``"to host"`` or ``"to device"``, unit index), since the start.
        bytes: that travelled, by direction.
    """

    def __init__(self, source: torch.device, *, pin: bool) -> None:
        self.device = torch.device("cpu")
        self._stream = None if source.type == "cpu" else torch.Stream(source)
        self._pinned_for = source if pin and self._stream is not None else None
        self._pieces: defaultdict[int, list[Tensor]] = defaultdict(list)  # by bytes: what was lent before
        self._rising: deque[tuple[torch.Event, Tensor]] = deque()  # rounded weights that are on their way up
        self._trips: deque[Callable[[], None]] = deque()
        self.counts: Counter[tuple[str, int]] = Counter()
        self.bytes: Counter[str] = Counter()

    @classmethod
    def from_config(cls, config: Config, source: torch.device) -> Offload | None:
        """``None`` where states stay with the weights, which on a CPU are in host memory already."""
        wanted = config.zero_optimization.offload_optimizer
        return cls(source, pin=wanted.pin_memory) if wanted.device == "cpu" and source.type != "cpu" else None

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat buffer in host memory, page-locked if the configuration says so, with arbitrary contents.

        It is used again when no tensor is in it any more: to lock memory takes long.
        """
        if self._pinned_for is None:
            return torch.empty(numel, dtype=dtype)
        pieces = self._pieces[numel * dtype.itemsize]
        piece = next((each for each in pieces if owns_its_memory(each)), None)
        if piece is None:
            piece = empty_pinned(numel * dtype.itemsize, torch.uint8, self._pinned_for)
            pieces.append(piece)
        return torch.empty(0, dtype=dtype).set_(piece.untyped_storage(), 0, (numel,), (1,))

    def copy_to_host(self, unit: int, shard: Tensor, then: Callable[[Tensor], None]) -> None:
        """Start to copy ``shard`` (1-D) of ``unit`` to the host.

        ``then(copy)`` is called when it is there, in the order of the calls and at the latest in
        :meth:`wait_for_copies`. Until then ``shard`` must not be written.
        """
        self._note("to host", unit, shard)
        host = self.empty(shard.numel(), shard.dtype)
        wait = self._start_copy(shard, host)

        def finish() -> None:
            wait()
            then(host)

        self._trips.append(finish)
        while len(self._trips) > _UNDER_WAY:
            self._trips.popleft()()

    def wait_for_copies(self) -> None:
        """Return when everything that is on its way down is there."""
        while self._trips:
            self._trips.popleft()()

    def copy_to_device(self, unit: int, master: Tensor, weights: Tensor) -> None:
        """Bring ``master``, rounded, into ``weights`` on the device: what is queued there afterwards sees it.

        Rounding on the host halves what travels. From page-locked memory this does not wait for the copy.
        """
        self._note("to device", unit, weights)
        rounded = master
        if master.dtype != weights.dtype:
            while len(self._rising) > _UNDER_WAY:
                self._rising.popleft()[0].synchronize()
            rounded = self.empty(master.numel(), weights.dtype).copy_(master)
        weights.copy_(rounded, non_blocking=True)
        if rounded is not master and self._stream is not None:
            self._rising.append((torch.accelerator.current_stream(weights.device).record_event(), rounded))

    def _start_copy(self, shard: Tensor, host: Tensor) -> Callable[[], None]:
        """Start the copy; what is returned waits for it on the host."""
        if self._stream is None:
            host.copy_(shard)
            return lambda: None
        self._stream.wait_stream(torch.accelerator.current_stream(shard.device))
        with self._stream:
            host.copy_(shard, non_blocking=True)
            return self._stream.record_event().synchronize

    def _note(self, direction: str, unit: int, moved: Tensor) -> None:
        self.counts[direction, unit] += 1
        self.bytes[direction] += moved.nbytes
