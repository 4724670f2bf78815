"""The flat gradients of one bucket on this rank: collected from ``.grad``, summed over ranks, kept until the step.

    partial     gradients of this rank only, the full bucket, while they wait for a reduction
    reduced     sums over all ranks from the first reduction of a window to its step; they cover what the states cover

In a single process nothing is reduced: gradients are collected into ``reduced`` at once. ``reduced`` may live in host
memory (:class:`shardline.sharding.host.HostMemory`): then a complete sum is copied down and added there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shardline.comm import DONE, Comm, Work
from shardline.plan import Run
from shardline.plan.placement import Placement
from shardline.sharding.buffer import BufferPool, flat, owns_its_memory, view
from shardline.sharding.gradient import collect_grads, drop_grads, gradient_error, has_grads
from shardline.sharding.host import HostMemory
from shardline.sharding.parameter import autograd_grad
from shardline.sharding.precision import Precision
from shardline.sharding.shard import Shard

__all__ = ["FlatGrads", "cut"]


class FlatGrads:
    """The gradients of one bucket on this rank, from ``.grad`` to the step.

    Attributes:
        params: the model's own parameters, in order of the entries.
        is_local: whether nothing is reduced.
        dtype: in which gradients are added up.
    """

    def __init__(
        self,
        shard: Shard,
        params: Sequence[nn.Parameter],
        comm: Comm,
        pool: BufferPool,
        precision: Precision,
        host: HostMemory | None = None,
    ) -> None:
        self.shard, self.plan, self.params = shard, shard.plan, params
        self.comm, self.pool, self.host = comm, pool, host
        single = comm.shard.size == 1
        self.is_local = single and host is None
        self.dtype = precision.grad_dtype(self.plan.dtype)
        self.master_dtype = precision.master_dtype(self.plan.dtype)
        self.wire_dtype = self.plan.dtype if single else precision.reduce_dtype(self.plan.dtype, shard.stage.gradients)
        self._loss_is_scaled = precision.compute is torch.float16
        # At stage 0 the full gradient is part of the peak anyway: a buffer of the pool saves its page faults.
        self._is_pooled = shard.stage.states is Placement.REPLICATED and not self.is_local and host is None
        self.partial: Tensor | None = None
        self.reduced: Tensor | None = None

    # -- collecting -------------------------------------------------------------------------------------------------

    def has_uncollected(self) -> bool:
        """Whether autograd has left a ``.grad`` that was not collected yet."""
        return has_grads(self.params)

    def accumulate(self, factor: float) -> None:
        """Move the parameters' ``.grad``, times ``factor``, into ``partial``; if nothing is reduced, ``reduced``."""
        if self.is_local:
            fresh = self.reduced is None
            if fresh and self._use_only_grad(factor):
                return
            if self.reduced is None:
                self.reduced = self._empty()
            self._pack(self.reduced, factor, add=not fresh)
            return
        fresh = self.partial is None
        if self.partial is None:
            self.partial = self.pool.borrow(self.plan.size, self.dtype, lasting=True)
        self._pack(self.partial, factor, add=not fresh)

    def _use_only_grad(self, factor: float) -> bool:
        """Where the bucket is one parameter, its gradient, if its strides fit, becomes ``reduced`` without a copy.

        Unless autograd gave the same memory to another parameter (views of one sum): it would be scaled twice.
        """
        param, entry = self.params[0], self.plan.entries[0]
        with torch._C.DisableTorchFunctionSubclass():
            found = autograd_grad(param)
        if found is None or found.layout is not torch.strided or found.dtype != self.dtype:
            return False
        if found.numel() != self.plan.size or found.stride() != entry.param.stride or not owns_its_memory(found):
            return False
        drop_grads(self.params)
        self.reduced = flat(found)
        if factor != 1.0:
            self.reduced.mul_(factor)
        return True

    def _pack(self, target: Tensor, factor: float, *, add: bool) -> None:
        """Copy or add the parameters' gradients to their places in ``target``, and free them."""
        grads, places, missing = [], [], []
        for grad, entry in zip(collect_grads(self.params), self.plan.entries, strict=True):
            if grad is None:
                missing.append(target[entry.offset : entry.stop])
            else:
                grads.append(grad.to_dense() if grad.layout is not torch.strided else grad)
                places.append(view(target, entry))
        # What is scaled is the target: two gradients may be views of the same memory.
        if add:
            if grads:
                torch._foreach_add_(places, grads, alpha=factor)
            return
        if grads:
            torch._foreach_copy_(places, grads)
            if factor != 1.0:
                torch._foreach_mul_(places, factor)
        missing += [target[start:stop] for start, stop in self.plan.gaps]
        if missing:
            torch._foreach_zero_(missing)

    def _empty(self) -> Tensor:
        low, high = self.shard.states
        if self._is_pooled:
            return self.pool.borrow(high - low, self.dtype, lasting=True)
        # Not from the pool: a shard lives until the step, and between steps its memory serves activations.
        return torch.empty(high - low, dtype=self.dtype, device=self.comm.device)

    def drop(self) -> None:
        """Discard what was accumulated in this window."""
        if self.reduced is not None and self._is_pooled:
            self.pool.give_back(self.reduced)
        if self.partial is not None:
            self.pool.give_back(self.partial)
        self.partial = self.reduced = None
        drop_grads(self.params)

    # -- over ranks -------------------------------------------------------------------------------------------------

    def reduce_scatter(self, unit: int, factor: float) -> Work:
        """Start to sum the gradients of all ranks into this rank's range of ``reduced``."""
        if self.is_local:
            self.accumulate(factor)
            return DONE
        if self.host is not None:
            return self._reduce_to_host(self.host, unit, *self._source(factor))
        add = self.reduced is not None
        reduced = self._empty() if self.reduced is None else self.reduced
        source, borrowed = self._source(factor, None if add else reduced)
        self.reduced, out = reduced, self.shard.own(reduced)
        work = self.comm.reductions.reduce(unit, source, self.plan.cuts, out, add=add, scratch=self.pool)
        return work.then(lambda: self._give_back(borrowed)) if borrowed else work

    def _reduce_to_host(self, host: HostMemory, unit: int, source: Tensor, borrowed: list[Tensor]) -> Work:
        """The same where ``reduced`` is in host memory: the sum goes there when it is complete."""
        if self.comm.shard.size == 1:
            total, work, borrowed = source, DONE, [each for each in borrowed if each is not source]
        else:
            total = self.pool.borrow(self.shard.stop - self.shard.start, self.dtype)
            work = self.comm.reductions.reduce(unit, source, self.plan.cuts, total, add=False, scratch=self.pool)

        def add(arrived: Tensor) -> None:
            self.pool.give_back(total)
            if self.reduced is None:
                self.reduced = arrived.to(self.dtype)
            else:
                self.reduced.add_(arrived)

        def finish() -> None:
            self._give_back(borrowed)
            host.copy_to_host(unit, total, add)

        return work.then(finish)

    def _give_back(self, borrowed: list[Tensor]) -> None:
        while borrowed:
            self.pool.give_back(borrowed.pop())

    def _source(self, factor: float, place: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """This rank's gradients as they travel, and the buffers of the pool in which they lie.

        They may be packed into ``place``, where their sum will be, if that is as large as the bucket.
        """
        if self.partial is None:
            if place is not None and place.numel() == self.plan.size and place.dtype == self.wire_dtype:
                self._pack(place, factor, add=False)
                return place, []
            wire = self.pool.borrow(self.plan.size, self.wire_dtype)
            self._pack(wire, factor, add=False)
            return wire, [wire]
        self.accumulate(factor)
        partial, self.partial = self.partial, None
        if partial.dtype == self.wire_dtype or self.comm.shard.size == 1:
            return partial, [partial]
        wire = self.pool.borrow(self.plan.size, self.wire_dtype)
        wire.copy_(partial)
        return wire, [wire, partial]

    def gather(self, unit: int) -> Work:
        """Where states rest in full, bring the reduced gradients of all shards here."""
        if self.reduced is None or self.shard.stage.states is not Placement.REPLICATED:
            return DONE
        return self.comm.gathers.gather(unit, self.reduced, self.plan.cuts)

    # -- what users and the optimizer see ---------------------------------------------------------------------------

    @property
    def is_full(self) -> bool:
        """Whether what was collected is the gradient, without a loss scale, to be seen and changed."""
        return self.is_local and not self._loss_is_scaled

    def of_param(self, index: int) -> Tensor | None:
        """What ``.grad`` of a parameter is since its gradient was collected: None where nothing was.

        Raises:
            UsageError: where it is not whole, or has a loss scale.
        """
        entry = self.plan.entries[index]
        full = self.full(f"parameter {entry.param.name!r}", ".grad")
        return None if full is None else view(full, entry)

    def full(self, name: str, operation: str) -> Tensor | None:
        """The bucket's gradients, to be seen and changed; None where none was collected. Raises as :meth:`of_param`.

        ``name`` and ``operation`` are for the error.
        """
        if self.reduced is None and self.partial is None:
            return None
        if not self.is_full:
            raise gradient_error(name, operation)
        return self.reduced

    def of_run(self, run: Run) -> Tensor | None:
        """The gradients of ``run``, in the dtype of the masters; a view where that is theirs."""
        if self.reduced is None:
            return None
        return cut(self.reduced, run, self.shard.states[0]).to(self.master_dtype)


def cut(buffer: Tensor, run: Run, low: int) -> Tensor:
    """The range of ``run`` in ``buffer``, which begins at element ``low`` of its bucket, as the optimizer sees it."""
    if run.entry is None:
        return buffer[run.start - low : run.stop - low]
    param = run.entry.param
    return buffer.as_strided(param.shape, param.stride, buffer.storage_offset() + run.start - low)
