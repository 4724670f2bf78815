"""The flat weights of one bucket on this rank: what rests here, the full buffer while it is in use, and the masters.

    resting     what rests on this rank: the full bucket (placement R) or this rank's shard (S)
    full        all weights while they are in use; ``resting`` itself where they rest in full
    master      what the optimizer updates, in fp32: a view of ``resting`` where that is fp32, else a buffer
    average     a moving average of the masters, where one is kept

``master`` may live in host memory (:class:`shardline.sharding.host.HostMemory`); a refresh copies it to the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from shardline.comm import Comm, Work
from shardline.plan import Entry
from shardline.plan.placement import Placement
from shardline.sharding.buffer import BufferPool, empty, in_storage_order, view
from shardline.sharding.host import HostMemory
from shardline.sharding.precision import Precision
from shardline.sharding.shard import Range, Shard, within

__all__ = ["FlatWeights"]


class FlatWeights:
    """The weights of one bucket on this rank: at rest, gathered, and the masters that the optimizer updates.

    Attributes:
        generation: raised whenever the weights change other than by an edit, which a parameter's version tells; what
            was saved under an older one is stale.
        before_edit: the masters before an edit, until training goes on: where a weight comes back, its master does.
    """

    def __init__(
        self, shard: Shard, comm: Comm, pool: BufferPool, precision: Precision, host: HostMemory | None = None
    ) -> None:
        self.shard, self.comm, self.pool, self.host = shard, comm, pool, host
        self.dtype = shard.plan.dtype
        self.master_dtype = precision.master_dtype(self.dtype)
        self.masters_are_weights = self.master_dtype == self.dtype and host is None
        self.resting: Tensor = torch.empty(0)
        self.full: Tensor | None = None
        self.master: Tensor | None = None
        self.average: Tensor | None = None
        self.generation = 0
        self.before_edit: Tensor | None = None

    def allocate(self) -> None:
        """Make weights and masters, without values yet; gaps are zero."""
        low, high = self.shard.weights
        self.resting = self._clear_gaps(empty(high - low, self.dtype, self.comm.device), low)
        if not self.shard.plan.trainable:
            return
        low, high = self.shard.states
        if self.masters_are_weights:
            sharded = self.shard.stage.states is Placement.SHARDED
            self.master = self.shard.own(self.resting) if sharded else self.resting
        elif self.host is not None:
            self.master = self._clear_gaps(self.host.empty(high - low, self.master_dtype), low)
        else:
            self.master = self._clear_gaps(empty(high - low, self.master_dtype, self.comm.device), low)

    def _clear_gaps(self, buffer: Tensor, low: int) -> Tensor:
        """``buffer``, which begins at element ``low`` of the bucket, with zeros where no parameter lies."""
        for start, stop in self.shard.plan.gaps:
            buffer[max(start - low, 0) : max(stop - low, 0)].zero_()
        return buffer

    def authoritative(self) -> tuple[Tensor, int, int]:
        """The masters where there are any, else the weights, and the range of the bucket that they cover."""
        if self.master is not None:
            return self.master, *self.shard.states
        return self.resting, *self.shard.weights

    def gather_authoritative(self, unit: int) -> Tensor:
        """The same in full: those themselves where they are. Collective where they are sharded."""
        stage = self.shard.stage
        return self.gather(unit, self.authoritative()[0], stage.weights if self.master is None else stage.states)

    def gather(self, unit: int, part: Tensor, placement: Placement) -> Tensor:
        """``part``, a buffer in ``placement``, in full on every rank, where it is. Collective where it is sharded."""
        return self._start(unit, part, placement)().to(part.device)

    def start_full(self, unit: int, *, masters: bool) -> Callable[[], Tensor]:
        """Start to bring the weights here in full, apart from ``full``; what is returned waits for them.

        It may give the buffer at rest. ``masters``: in their dtype, where there are any. Collective where sharded.
        """
        stage = self.shard.stage
        if masters and self.master is not None:
            return self._start(unit, self.master, stage.states)
        return self._start(unit, self.resting, stage.weights)

    def _start(self, unit: int, part: Tensor, placement: Placement) -> Callable[[], Tensor]:
        if placement is Placement.REPLICATED or self.comm.shard.size == 1:
            return lambda: part
        full = torch.empty(self.shard.plan.size, dtype=part.dtype, device=self.comm.device)
        self.shard.own(full).copy_(part)
        work = self.comm.gathers.gather(unit, full, self.shard.plan.cuts)

        def wait() -> Tensor:
            work.wait()
            return full

        return wait

    # -- values come in ---------------------------------------------------------------------------------------------

    def store(self, entry: Entry, value: Tensor) -> None:
        """Copy ``value``, the whole parameter of ``entry`` in any float dtype, into weights and masters."""
        self.store_range(entry, 0, in_storage_order(value, entry))

    def store_range(self, entry: Entry, start: int, elements: Tensor) -> None:
        """Copy ``elements`` (1-D, any float dtype), which begin at the parameter's element ``start`` in the order of
        storage, into weights and masters."""
        self._store(elements, entry.offset + start, self.resting, self.shard.weights)
        if self.master is not None and not self.masters_are_weights:
            self._store(elements, entry.offset + start, self.master, self.shard.states)

    def store_master(self, entry: Entry, value: Tensor) -> None:
        """Copy ``value``, the whole parameter of ``entry``, into the masters alone."""
        if self.master is not None:
            self._store(in_storage_order(value, entry), entry.offset, self.master, self.shard.states)

    @staticmethod
    def _store(elements: Tensor, offset: int, target: Tensor, covered: Range) -> None:
        low, high = max(offset, covered[0]), min(offset + elements.numel(), covered[1])
        if low < high:
            target[low - covered[0] : high - covered[0]].copy_(elements[low - offset : high - offset])

    def begin_average(self) -> None:
        """Let the average be what the masters are now."""
        self.average = None if self.master is None else self.master.clone()

    def store_average(self, entry: Entry, elements: Tensor) -> None:
        """Copy the average of the whole parameter of ``entry`` (1-D, in storage order) into this rank's."""
        if self.average is not None:
            self._store(elements, entry.offset, self.average, self.shard.states)

    def load(self, params: Sequence[nn.Parameter], source: int = 0) -> Work:
        """Start to copy the values that rank ``source`` holds in ``params`` themselves, in one broadcast.

        Collective. The parameters are not needed any more; their values are here when the work is done.
        """
        plan = self.shard.plan
        dtype = reduce(torch.promote_types, (param.dtype for param in params))
        in_place = dtype == self.dtype and self.resting.numel() == plan.size
        full = self.resting if in_place else self.pool.borrow(plan.size, dtype)
        if self.comm.shard.rank == source:
            for start, stop in plan.gaps:
                full[start:stop].zero_()
            for param, entry in zip(params, plan.entries, strict=True):
                view(full, entry).copy_(param.detach())

        def finish() -> None:
            if self.master is not None and not self.masters_are_weights:
                low, high = self.shard.states
                self.master.copy_(full[low:high])
            if not in_place:
                low, high = self.shard.weights
                self.resting.copy_(full[low:high])
                self.pool.give_back(full)

        work = self.comm.messages.start_broadcast(full, source).then(finish)
        if work.has_arrived():  # a single process: a buffer that is borrowed goes back at once
            work.wait()
        return work

    def write_from(self, full: Tensor, spans: Sequence[Range], *, restorable: bool = False) -> None:
        """Copy ``spans`` of ``full`` (in the dtype of the weights) into weights at rest and masters.

        Args:
            restorable: whether masters come back if the weights do; see :meth:`update_masters`.
        """
        self.comm.wait_for_readers()
        if self.resting.data_ptr() != full.data_ptr():
            first = self.shard.weights[0]
            for start, stop in within(spans, self.shard.weights):
                self.resting[start - first : stop - first].copy_(full[start:stop])
        self.update_masters(full, spans, restorable=restorable)

    def update_masters(self, full: Tensor, spans: Sequence[Range], *, restorable: bool) -> None:
        """Bring masters up to weights that were edited; where a weight is still its rounded master, that stays.

        Args:
            restorable: whether the masters from before the edit come back if, before the next update, the weights do.
        """
        if self.master is None or self.masters_are_weights:
            return
        low = self.shard.states[0]
        for start, stop in within(spans, self.shard.states):
            part = full[start:stop].to(self.master.device)
            master = self.master[start - low : stop - low]
            same = master.to(part.dtype) == part
            if restorable and self.before_edit is None and not bool(same.all()):
                self.before_edit = self.master.clone()
            updated = torch.where(same, master, part.to(self.master_dtype))
            if self.before_edit is not None:
                before = self.before_edit[start - low : stop - low]
                updated = torch.where(before.to(part.dtype) == part, before, updated)
            master.copy_(updated)

    def refresh(self, unit: int) -> None:
        """Bring this rank's updated masters into the weights at rest."""
        self.before_edit = None
        if self.master is None or self.masters_are_weights:
            return
        self.comm.wait_for_readers()
        low, _ = self.shard.weights
        first, last = self.shard.states
        target = self.resting[first - low : last - low]
        if self.host is None:
            target.copy_(self.master)
        else:
            self.host.copy_to_device(unit, self.master, target)

    # -- in full ----------------------------------------------------------------------------------------------------

    def start_gather(self, unit: int) -> Work:
        """Start to bring all weights into a new ``full``."""
        plan = self.shard.plan
        self.full = self.pool.borrow(plan.size, self.dtype)
        return self.comm.gathers.gather(unit, self.full, plan.cuts, own=self.resting)

    def join_gather(self, unit: int) -> None:
        """Take part in a gather for other ranks, and drop what comes."""
        plan = self.shard.plan
        full = self.pool.borrow(plan.size, self.dtype)
        self.comm.gathers.gather(unit, full, plan.cuts, own=self.resting).wait()
        self.pool.give_back(full)

    def drop_full(self) -> None:
        """Give the buffer of a gather back."""
        if self.full is not None:
            self.pool.give_back(self.full)
            self.full = None

    def clear(self) -> None:
        """Free all memory."""
        self.resting, self.full, self.master, self.average = torch.empty(0), None, None, None
