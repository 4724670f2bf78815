"""The algorithm of each transition over one process group: the best one on gloo, on NCCL, and on anything else.

Every transport has the same two methods for a flat buffer that is cut into one range for each rank: bring all ranges
here (gather), and bring the sum over ranks of this rank's range here (reduce). Both start at once, log what they start,
and return a :class:`Work`. Nothing lies between a transport and torch.distributed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shardline.comm.log import TransitionLog
from shardline.errors import UsageError
from shardline.watch import Channel, Operation, Ticket, Watch, WatchSettings

__all__ = [
    "BLOCK",
    "CLOSED",
    "DONE",
    "SINGLE_PROCESS",
    "AllToAllTransport",
    "HostStagedTransport",
    "NcclTransport",
    "Scratch",
    "Transport",
    "Work",
    "add_in_order",
    "choose",
    "closed_error",
    "is_staged",
    "put",
]

# torch 2.13 renames these two and deprecates the old names; 2.11 knows only the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Work:
    """A started transition. :meth:`wait` returns once its result may be used on the current stream.

    Until then it keeps every buffer of the transfer alive: c10d may still use them on another thread or stream.

    Args:
        handles: of c10d; ``finish`` waits for each.
        then: called after that.
        hold: what is kept.
        arrived: what :meth:`has_arrived` returns, if the handles cannot answer it.
        log: counts how long the host waits for ``handles``.
    """

    def __init__(
        self,
        handles: Sequence[dist.Work],
        *then: Callable[[], object],
        hold: object = None,
        arrived: Callable[[], bool] | None = None,
        log: TransitionLog | None = None,
        finish: Callable[[dist.Work], object] = dist.Work.wait,
    ) -> None:
        self._handles, self._then, self._hold, self._arrived, self._log = handles, then, hold, arrived, log
        self._finish = finish

    def then(self, action: Callable[[], object]) -> Work:
        """Let :meth:`wait` call ``action`` at its end. Returns the work to wait for, instead of this one."""
        if self is DONE:
            return Work((), action)
        self._then = (*self._then, action)
        return self

    def has_arrived(self) -> bool:
        """Whether :meth:`wait` would return without blocking the host."""
        if self._arrived is not None:
            return self._arrived()
        return all(handle.is_completed() for handle in self._handles)

    def wait(self) -> None:
        begin = time.perf_counter()
        for handle in self._handles:
            self._finish(handle)
        if self._log is not None:
            self._log.waited += time.perf_counter() - begin
        for action in self._then:
            action()
        self._handles, self._then, self._hold, self._arrived, self._log = (), (), None, None, None


DONE = Work(())


class Transport(Protocol):
    """How buffers move between the ranks of one group. Transitions of one transport have one order on all ranks."""

    def gather(
        self,
        unit: int | None,
        buffer: Tensor,
        cuts: Sequence[int],
        own: Tensor | None = None,
        operation: Operation = Operation.GATHER,
    ) -> Work:
        """Fill ``buffer`` (1-D) with every rank's range.

        Args:
            unit: index, for the log; None where it belongs to none.
            cuts: of the ranges, one more than ranks.
            own: this rank's range, where it rests. Not to be written before
                :meth:`shardline.comm.Comm.wait_for_readers`. Without it the range is in ``buffer``, all of which may
                be written when the work is done.
            operation: what it is for, which must be the same on all ranks.

        Raises:
            UsageError: the engine was destroyed.
            DisagreementError: another rank is known to have started something else.
        """
        ...

    def reduce(
        self, unit: int, buffer: Tensor, cuts: Sequence[int], out: Tensor, *, add: bool, scratch: Scratch
    ) -> Work:
        """Write (or ``add``) the sum over ranks of this rank's range of ``buffer`` (1-D) to ``out`` (1-D).

        Terms are added in rank order in ``out``'s dtype, so that every layout and every stage gives the same bits; NCCL
        adds shards of one size in its own order, in the dtype of ``buffer``. Raises as :meth:`gather`.
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


def put(own: Tensor, buffer: Tensor, cuts: Sequence[int], rank: int) -> None:
    """Copy ``own`` to its place in ``buffer``, unless it is there."""
    mine = buffer[cuts[rank] : cuts[rank + 1]]
    if own.data_ptr() != mine.data_ptr():
        mine.copy_(own)


class _SingleProcess:
    """Without other ranks every buffer is complete."""

    def gather(
        self,
        unit: int | None,
        buffer: Tensor,
        cuts: Sequence[int],
        own: Tensor | None = None,
        operation: Operation = Operation.GATHER,
    ) -> Work:
        return DONE

    def reduce(
        self, unit: int, buffer: Tensor, cuts: Sequence[int], out: Tensor, *, add: bool, scratch: Scratch
    ) -> Work:
        raise AssertionError("a single process has nothing to reduce: its buffers are aliases")


class _Closed:
    """After the process groups were destroyed."""

    def gather(
        self,
        unit: int | None,
        buffer: Tensor,
        cuts: Sequence[int],
        own: Tensor | None = None,
        operation: Operation = Operation.GATHER,
    ) -> Work:
        raise closed_error()

    def reduce(
        self, unit: int, buffer: Tensor, cuts: Sequence[int], out: Tensor, *, add: bool, scratch: Scratch
    ) -> Work:
        raise closed_error()


SINGLE_PROCESS, CLOSED = _SingleProcess(), _Closed()


def closed_error() -> UsageError:
    return UsageError("the engine was destroyed: its process groups are gone. Make a new one with initialize.")


class AllToAllTransport:
    """gloo, and any backend without a better one: exchanges ranges, and adds them up in the dtype of the result."""

    def __init__(self, group: dist.ProcessGroup, log: TransitionLog, channel: Channel | None = None) -> None:
        self.group, self.log = group, log
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.channel = channel or Channel(Watch(self.rank, WatchSettings()), 0)

    def gather(
        self,
        unit: int | None,
        buffer: Tensor,
        cuts: Sequence[int],
        own: Tensor | None = None,
        operation: Operation = Operation.GATHER,
    ) -> Work:
        self.log.record("gather", unit, cuts[-1], buffer.element_size())
        ticket = self.channel.start(operation, unit)
        if own is not None:
            put(own, buffer, cuts, self.rank)
        # One broadcast for each shard straight into its place: gloo's all-gather takes 1.6 times as long, and shards
        # need not be of one size.
        handles = []
        for rank in range(self.size):
            part = buffer[cuts[rank] : cuts[rank + 1]]
            if part.numel():
                handles.append(dist.broadcast(part, group_src=rank, group=self.group, async_op=True))
        return Work(handles, hold=buffer, log=self.log, finish=self._finish(buffer, ticket))

    def _finish(self, buffer: Tensor, ticket: Ticket) -> Callable[[dist.Work], object]:
        """How to wait for a transfer of ``buffer``: the host waits where that is in its memory, else the stream."""
        return partial(self.channel.finish, ticket=ticket) if buffer.device.type == "cpu" else dist.Work.wait

    def reduce(
        self, unit: int, buffer: Tensor, cuts: Sequence[int], out: Tensor, *, add: bool, scratch: Scratch
    ) -> Work:
        self.log.record("reduce", unit, cuts[-1], buffer.element_size())
        ticket = self.channel.start(Operation.REDUCE, unit)
        # gloo's reduce-scatter is an all-reduce and a slice (2 to 3 times the time); adding here also rounds once.
        mine = cuts[self.rank + 1] - cuts[self.rank]
        received = scratch.borrow(mine * self.size, buffer.dtype)
        sizes = [cuts[rank + 1] - cuts[rank] for rank in range(self.size)]
        handle = dist.all_to_all_single(
            received, buffer[: cuts[-1]], [mine] * self.size, sizes, group=self.group, async_op=True
        )

        def add_up() -> None:
            add_in_order(received.view(self.size, mine).unbind(), out, add=add)
            scratch.give_back(received)

        return Work([handle], add_up, hold=(buffer, received), log=self.log, finish=self._finish(buffer, ticket))


def _the_stream_waits() -> bool:
    return True


class NcclTransport(AllToAllTransport):
    """NCCL: its own collectives where shards are of one size."""

    def gather(
        self,
        unit: int | None,
        buffer: Tensor,
        cuts: Sequence[int],
        own: Tensor | None = None,
        operation: Operation = Operation.GATHER,
    ) -> Work:
        if not _equal(cuts):
            return super().gather(unit, buffer, cuts, own, operation)
        self.log.record("gather", unit, cuts[-1], buffer.element_size())
        self.channel.start(operation, unit)
        if own is None:
            own = buffer[cuts[self.rank] : cuts[self.rank + 1]]
        handle = _all_gather(buffer, own, group=self.group, async_op=True)
        return Work([handle], hold=(own, buffer), arrived=_the_stream_waits)

    def reduce(
        self, unit: int, buffer: Tensor, cuts: Sequence[int], out: Tensor, *, add: bool, scratch: Scratch
    ) -> Work:
        if not _equal(cuts):
            return super().reduce(unit, buffer, cuts, out, add=add, scratch=scratch)
        self.log.record("reduce", unit, cuts[-1], buffer.element_size())
        self.channel.start(Operation.REDUCE, unit)
        direct = out.dtype == buffer.dtype and not add
        target = out if direct else scratch.borrow(out.numel(), buffer.dtype)
        handle = _reduce_scatter(target, buffer, group=self.group, async_op=True)

        def store() -> None:
            if not direct:
                add_in_order([target], out, add=add)
                scratch.give_back(target)

        return Work([handle], store, hold=(buffer, target), arrived=_the_stream_waits)


class HostStagedTransport:
    """Accelerator tensors over a CPU backend: the buffer goes through host memory (two ranks that share one GPU)."""

    def __init__(self, inner: AllToAllTransport) -> None:
        self.inner = inner

    def gather(
        self,
        unit: int | None,
        buffer: Tensor,
        cuts: Sequence[int],
        own: Tensor | None = None,
        operation: Operation = Operation.GATHER,
    ) -> Work:
        if own is None:
            own = buffer[cuts[self.inner.rank] : cuts[self.inner.rank + 1]]
        host = torch.empty(cuts[-1], dtype=buffer.dtype)
        work = self.inner.gather(unit, host, cuts, own.cpu(), operation)
        return work.then(lambda: buffer[: cuts[-1]].copy_(host))

    def reduce(
        self, unit: int, buffer: Tensor, cuts: Sequence[int], out: Tensor, *, add: bool, scratch: Scratch
    ) -> Work:
        host, host_out = buffer.cpu(), torch.empty(out.shape, dtype=out.dtype)
        work = self.inner.reduce(unit, host, cuts, host_out, add=False, scratch=_HostScratch())
        return work.then(lambda: out.add_(host_out.to(out.device)) if add else out.copy_(host_out))


class _HostScratch:
    def borrow(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype)

    def give_back(self, buffer: Tensor) -> None:
        pass


def _equal(cuts: Sequence[int]) -> bool:
    first = cuts[1]
    return all(stop - start == first for start, stop in pairwise(cuts))


def is_staged(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether tensors on ``device`` go through host memory, as ``group`` has no backend for them."""
    return device.type != "cpu" and _backend(group, device) in (None, "gloo")


def choose(
    group: dist.ProcessGroup,
    device: torch.device,
    log: TransitionLog | None = None,
    channel: Channel | None = None,
) -> Transport:
    """The best transport for tensors on ``device`` among the ranks of ``group``."""
    log = log or TransitionLog()
    if device.type != "cpu" and _backend(group, device) == "nccl":
        return NcclTransport(group, log, channel)
    all_to_all = AllToAllTransport(group, log, channel)
    return HostStagedTransport(all_to_all) if is_staged(group, device) else all_to_all


def _backend(group: dist.ProcessGroup, device: torch.device) -> str | None:
    try:
        return group._get_backend(device).name()
    except RuntimeError:  # it has none for this type of device
        return None
