"""A bucket: parameters of one dtype and trainability that lie in the same flat buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from shardline.comm import Comm
from shardline.plan import BucketPlan, Entry, Fragment, Run
from shardline.plan.placement import Stage
from shardline.sharding.buffer import BufferPool, view
from shardline.sharding.edits import Edits
from shardline.sharding.flat_grads import FlatGrads, cut
from shardline.sharding.flat_weights import FlatWeights
from shardline.sharding.gradient import drop_grads
from shardline.sharding.host import HostMemory
from shardline.sharding.parameter import ParamRecord, make_ordinary, seal, show
from shardline.sharding.precision import Precision
from shardline.sharding.shard import Shard

__all__ = ["Bucket", "RunTensors"]


@dataclass(frozen=True)
class RunTensors:
    """A run of this rank's masters: the optimizer's parameter, and the fragments that it consists of."""

    run: Run
    bucket: Bucket
    param: Tensor
    fragments: tuple[Fragment, ...]

    def own_fragments(self) -> Iterator[Fragment]:
        """Its fragments in this rank's shard: a run of replicated states covers more than that."""
        low, high = self.own_range()
        return self.bucket.plan.fragments(low, high)

    def own_range(self) -> tuple[int, int]:
        """The range of the bucket that is both the run's and this rank's shard; it may be empty."""
        shard = self.bucket.shard
        low = max(self.run.start, shard.start)
        return low, max(low, min(self.run.stop, shard.stop))


class Bucket:
    """The flat weights and gradients of one bucket on this rank, and the owner of its parameters' data.

    Attributes:
        params: the model's own parameters, in order of the entries.
        shard: which part of the bucket is this rank's.
        weights, grads: the buffers.
        edits: what users do to the parameters.
        sharded_grad: what ``.grad`` of a parameter is once its gradient was collected and is not whole; else it raises.
    """

    detaches: ClassVar[bool] = False
    advice: ClassVar[str] = (
        "Read or change it inside `with engine.gathered_parameters():` (write=True to change it), or take the whole "
        "weights from engine.full_state_dict() instead of state_dict()."
    )
    conversion: ClassVar[str] = "A model is moved or converted before shardline.initialize."

    def __init__(
        self,
        plan: BucketPlan,
        params: Sequence[nn.Parameter],
        stage: Stage,
        comm: Comm,
        pool: BufferPool,
        precision: Precision,
        host: HostMemory | None = None,
        *,
        on_sealed_access: Callable[[], bool] = lambda: False,
        may_convert: Callable[[], bool] = lambda: False,
    ) -> None:
        self.plan, self.params, self.on_sealed_access = plan, list(params), on_sealed_access
        self.shard = Shard(plan, stage, *plan.shard(comm.shard.rank))
        self.weights = FlatWeights(self.shard, comm, pool, precision, host)
        self.grads = FlatGrads(self.shard, self.params, comm, pool, precision, host)
        self.edits = Edits(self.params, self.weights, may_convert)
        self.sharded_grad: Callable[[Bucket, int], Tensor | None] | None = None
        self._records = {
            entry.param.name: ParamRecord(entry.param.name, i, self) for i, entry in enumerate(plan.entries)
        }

    # -- what parameters show ---------------------------------------------------------------------------------------

    def bind(self, full: Tensor) -> None:
        """Make the parameters views of ``full``."""
        for param, record, entry in zip(self.params, self._records.values(), self.plan.entries, strict=True):
            show(param, view(full, entry), record)
        self.edits.note_versions()

    def seal(self) -> None:
        """Seal the parameters."""
        self.edits.forget_aliases()
        for param, record in zip(self.params, self._records.values(), strict=True):
            seal(param, record, self.weights.resting)

    def seal_or_bind(self, entry: Entry, *, sealed: bool) -> None:
        """Seal one parameter, whose values are stored, or make it a view of the weights at rest."""
        record = self._records[entry.param.name]
        if sealed:
            seal(self.params[record.index], record, self.weights.resting)
        else:
            show(self.params[record.index], view(self.weights.resting, entry), record)

    def detach_params(self) -> None:
        """Give the parameters tensors of their own; the bucket is not used any more."""
        full = self.weights.full
        if full is not None:
            for param, entry in zip(self.params, self.plan.entries, strict=True):
                make_ordinary(param, view(full, entry).clone())
            drop_grads(self.params)
        self.weights.clear()
        self.grads.partial = self.grads.reduced = None
        self.params.clear()  # a parameter and its bucket refer to each other: a cycle

    # -- parameter.Owner --------------------------------------------------------------------------------------------

    def on_data_read(self, index: int, alias: Tensor) -> None:
        self.edits.on_data_read(index, alias)

    def on_data_assigned(self, index: int, value: Tensor) -> None:
        self.edits.on_data_assigned(index, value)

    def stride_of(self, index: int) -> tuple[int, ...]:
        return self.plan.entries[index].param.stride

    def grad_of(self, index: int) -> Tensor | None:
        if self.sharded_grad is not None and not self.grads.is_full:
            return self.sharded_grad(self, index)
        return self.grads.of_param(index)

    # -- what the optimizer sees ------------------------------------------------------------------------------------

    def runs(self) -> Iterator[RunTensors]:
        """This rank's runs, each with its range of the masters."""
        master = self.weights.master
        if master is None:
            return
        low, high = self.shard.states
        for run in self.plan.runs(low, high):
            yield RunTensors(run, self, cut(master, run, low), tuple(self.plan.fragments(run.start, run.stop)))

    def move_masters(self, runs: Iterable[RunTensors], device: torch.device) -> int:
        """Bring masters and averages to ``device``, and with them ``runs``, this rank's runs here.

        Masters that are the weights themselves stay. Returns the bytes that moved.
        """
        weights, moved = self.weights, 0
        if weights.average is not None and weights.average.device != device:
            weights.average = weights.average.to(device)
            moved += weights.average.nbytes
        if weights.master is None or weights.masters_are_weights or weights.master.device == device:
            return moved
        weights.master.data = weights.master.to(device)  # the tensor stays: runs are views of it, and would keep it
        if weights.before_edit is not None:
            weights.before_edit = weights.before_edit.to(device)
        for run in runs:
            run.param.data = cut(weights.master, run.run, self.shard.states[0])
        return moved + weights.master.nbytes
