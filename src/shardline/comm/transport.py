"""The algorithm of each transition over one c10d process group: what runs best on gloo, on NCCL, and on anything else.

Every transport answers the same two questions about a flat buffer cut into one range per rank: bring all ranges here
(gather), and bring the sum over ranks of my range here (reduce). Both start at once and return a :class:`Work`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "BLOCK",
    "DONE",
    "ExchangeTransport",
    "HostStagedTransport",
    "NcclTransport",
    "Scratch",
    "Transport",
    "Work",
    "add_in_order",
    "by_host",
    "choose",
    "put",
]


class Work:
    """A started transition. ``wait`` returns once its result may be used on the current stream.

    It keeps every buffer that the transfer touches alive until then: c10d may still be reading them on another thread
    or stream.
    """

    def __init__(
        self,
        handles: Sequence[dist.Work],
        then: Callable[[], None] | None = None,
        hold: object = None,
        arrived: Callable[[], bool] | None = None,
    ) -> None:
        self._handles, self._then, self._hold, self._arrived = handles, then, hold, arrived

    def has_arrived(self) -> bool:
        """Whether :meth:`wait` would keep the host waiting for nobody."""
        if self._arrived is not None:
            return self._arrived()
        return all(handle.is_completed() for handle in self._handles)

    def wait(self) -> None:
        for handle in self._handles:
            handle.wait()
        if self._then is not None:
            self._then()
        self._handles, self._then, self._hold, self._arrived = (), None, None, None


DONE = Work(())


class Transport(Protocol):
    """How buffers travel between the ranks of one group."""

    def gather(self, own: Tensor, buffer: Tensor, boundaries: Sequence[int]) -> Work:
        """Fill ``buffer`` (1-D) with every rank's range.

        ``own`` is this rank's: its place in ``buffer``, which is free to be written when the work is done, or a tensor
        elsewhere, which the others may read for longer.
        """
        ...

    def reduce(self, buffer: Tensor, boundaries: Sequence[int], out: Tensor, *, add: bool, scratch: Scratch) -> Work:
        """Write (or ``add``) the sum over ranks of this rank's range of ``buffer`` to ``out``.

        Terms are added in rank order in ``out``'s dtype, so that every layout and every stage gives the same bits; NCCL
        adds shards of one size in its own order, in the dtype of ``buffer``.
        """
        ...


class Scratch(Protocol):
    """Where transports borrow temporary flat buffers."""

    def borrow(self, numel: int, dtype: torch.dtype) -> Tensor: ...

    def give_back(self, buffer: Tensor) -> None: ...


BLOCK = 1 << 17
"""Elements that are summed at a time on CPU: few enough to stay in the cache from one term to the next."""


def add_in_order(parts: Sequence[Tensor], out: Tensor, *, add: bool) -> None:
    """``out (+)= parts[0] + parts[1] + ...``, each sum rounded to ``out``'s dtype. ``out`` may be one of ``parts``."""
    step = BLOCK if out.device.type == "cpu" else max(1, out.numel())
    for start in range(0, out.numel(), step):
        block, *terms = (each[start : start + step] for each in (out, *parts))
        if not add:
            if len(terms) > 1 and terms[0].dtype == terms[1].dtype == out.dtype:
                terms[2:] = [_apart(term, block) for term in terms[2:]]
                torch.add(terms.pop(0), terms.pop(0), out=block)
            else:
                terms[1:] = [_apart(term, block) for term in terms[1:]]
                block.copy_(terms.pop(0))
        for term in terms:
            block.add_(term)


def _apart(term: Tensor, block: Tensor) -> Tensor:
    return term.clone() if term.data_ptr() == block.data_ptr() else term


def put(own: Tensor, buffer: Tensor, boundaries: Sequence[int], rank: int) -> None:
    """Bring ``own`` to its place in ``buffer``, if it is not there."""
    mine = buffer[boundaries[rank] : boundaries[rank + 1]]
    if own.data_ptr() != mine.data_ptr():
        mine.copy_(own)


class ExchangeTransport:
    """gloo, and any backend that knows no better: ranges are exchanged, and summed here in the dtype of the result."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def gather(self, own: Tensor, buffer: Tensor, boundaries: Sequence[int]) -> Work:
        put(own, buffer, boundaries, self.rank)
        # One broadcast for each shard straight into its place: gloo's all-gather takes 1.6 times as long, and shards
        # need not be of one size.
        handles = []
        for rank in range(self.size):
            part = buffer[boundaries[rank] : boundaries[rank + 1]]
            if part.numel():
                handles.append(dist.broadcast(part, group_src=rank, group=self.group, async_op=True))
        return Work(handles, hold=buffer)

    def reduce(self, buffer: Tensor, boundaries: Sequence[int], out: Tensor, *, add: bool, scratch: Scratch) -> Work:
        # gloo's reduce-scatter is an all-reduce and a slice (2 to 3 times the time); summing here also rounds once.
        mine = boundaries[self.rank + 1] - boundaries[self.rank]
        received = scratch.borrow(mine * self.size, buffer.dtype)
        sizes = [boundaries[rank + 1] - boundaries[rank] for rank in range(self.size)]
        handle = dist.all_to_all_single(
            received, buffer[: boundaries[-1]], [mine] * self.size, sizes, group=self.group, async_op=True
        )

        def add_up() -> None:
            add_in_order(received.view(self.size, mine).unbind(), out, add=add)
            scratch.give_back(received)

        return Work([handle], add_up, hold=(buffer, received))


def _the_stream_waits() -> bool:
    return True


class NcclTransport(ExchangeTransport):
    """NCCL: its own collectives where shards are of one size."""

    def gather(self, own: Tensor, buffer: Tensor, boundaries: Sequence[int]) -> Work:
        if not _equal(boundaries):
            return super().gather(own, buffer, boundaries)
        return Work([_all_gather(buffer, own, self.group)], hold=(own, buffer), arrived=_the_stream_waits)

    def reduce(self, buffer: Tensor, boundaries: Sequence[int], out: Tensor, *, add: bool, scratch: Scratch) -> Work:
        if not _equal(boundaries):
            return super().reduce(buffer, boundaries, out, add=add, scratch=scratch)
        direct = out.dtype == buffer.dtype and not add
        target = out if direct else scratch.borrow(out.numel(), buffer.dtype)
        handle = _reduce_scatter(target, buffer, self.group)

        def store() -> None:
            if not direct:
                add_in_order([target], out, add=add)
                scratch.give_back(target)

        return Work([handle], store, hold=(buffer, target), arrived=_the_stream_waits)


class HostStagedTransport:
    """Accelerator tensors over a CPU backend: the buffer goes through host memory (two ranks that share one GPU)."""

    def __init__(self, inner: Transport) -> None:
        self.inner = inner

    def gather(self, own: Tensor, buffer: Tensor, boundaries: Sequence[int]) -> Work:
        host = torch.empty(boundaries[-1], dtype=buffer.dtype)
        work = self.inner.gather(own.cpu(), host, boundaries)

        def back() -> None:
            work.wait()
            buffer[: boundaries[-1]].copy_(host)

        return Work((), back, hold=(buffer, host), arrived=work.has_arrived)

    def reduce(self, buffer: Tensor, boundaries: Sequence[int], out: Tensor, *, add: bool, scratch: Scratch) -> Work:
        host, host_out = buffer.cpu(), torch.empty(out.shape, dtype=out.dtype)
        work = self.inner.reduce(host, boundaries, host_out, add=False, scratch=_HostScratch())

        def back() -> None:
            work.wait()
            if add:
                out.add_(host_out.to(out.device))
            else:
                out.copy_(host_out)

        return Work((), back, hold=(host, host_out), arrived=work.has_arrived)


class _HostScratch:
    def borrow(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype)

    def give_back(self, buffer: Tensor) -> None:
        pass


def _equal(boundaries: Sequence[int]) -> bool:
    first = boundaries[1]
    return all(stop - start == first for start, stop in pairwise(boundaries))


# torch 2.13 renames these two and deprecates the old names; 2.11 knows only the old ones.
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_from = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _all_gather(out: Tensor, own: Tensor, group: dist.ProcessGroup) -> dist.Work:
    return _all_gather_into(out, own, group=group, async_op=True)  # type: ignore[no-any-return]


def _reduce_scatter(out: Tensor, buffer: Tensor, group: dist.ProcessGroup) -> dist.Work:
    return _reduce_scatter_from(out, buffer, group=group, async_op=True)  # type: ignore[no-any-return]


def by_host(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether tensors on ``device`` cannot travel in ``group`` themselves."""
    return device.type != "cpu" and _backend(group, device) in (None, "gloo")


def choose(group: dist.ProcessGroup, device: torch.device) -> Transport:
    """The best transport for tensors on ``device`` among the ranks of ``group``."""
    if device.type != "cpu" and _backend(group, device) == "nccl":
        return NcclTransport(group)
    exchange = ExchangeTransport(group)
    return HostStagedTransport(exchange) if by_host(group, device) else exchange


def _backend(group: dist.ProcessGroup, device: torch.device) -> str | None:
    try:
        return group._get_backend(device).name()
    except RuntimeError:  # it has none for this type of device
        return None
