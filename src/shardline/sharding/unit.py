"""One unit at run time: parameters that are gathered, used, resharded and reduced together.

A unit moves its buckets together (:mod:`shardline.sharding.bucket`). In a single process every transition is an alias:
nothing is copied or sent.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
from torch import nn

from shardline.comm import Comm, Work
from shardline.errors import UsageError
from shardline.plan import Entry, UnitPlan
from shardline.plan.placement import Placement, Stage, Transition, transition
from shardline.sharding.bucket import Bucket
from shardline.sharding.buffer import BufferPool
from shardline.sharding.host import HostMemory
from shardline.sharding.precision import Precision

__all__ = ["Residence", "Unit"]


class Residence(Enum):
    """Where a unit's full weights are, and what its parameters show."""

    SHARDED = "sharded"  # not here; parameters are sealed
    GATHERING = "gathering"  # being gathered; parameters are sealed
    GATHERED = "gathered"  # here; parameters are views of them
    GATHERED_SEALED = "gathered, sealed"  # here, for a use that comes soon; parameters are sealed


_NEXT_RESIDENCES = {
    Residence.SHARDED: {Residence.GATHERING},
    Residence.GATHERING: {Residence.GATHERED, Residence.SHARDED},
    Residence.GATHERED: {Residence.SHARDED, Residence.GATHERED_SEALED},
    Residence.GATHERED_SEALED: {Residence.GATHERED, Residence.SHARDED},
}


class Unit:
    """The buckets of one unit on this rank, and the state that their weights are in.

    Attributes:
        sharded: whether the weights rest sharded, so that a use needs a gather.
        is_local: whether reductions are aliases: a single process whose states are where its weights are.
        state_device: where masters, reduced gradients and optimizer state are.
        residence: where the full weights are now.
        holds: uses in progress, by calls of modules and by ``gathered_parameters()``; a unit in use is not resharded.
        pinned: a graph may hold the parameters themselves: they stay, in full, until the weights change.
        on_convert: asked before a parameter is converted. Returns True if that is allowed, and has noted the unit: the
            schedule calls :meth:`restore_views` when the forward or backward ends.
    """

    def __init__(
        self,
        plan: UnitPlan,
        params: dict[str, nn.Parameter],
        stage: Stage,
        comm: Comm,
        pool: BufferPool,
        precision: Precision,
        on_sealed_access: Callable[[Unit], bool],
        host: HostMemory | None = None,
    ) -> None:
        self.plan, self.stage, self.comm, self.pool, self.host = plan, stage, comm, pool, host
        self.state_device = comm.device if host is None else host.device
        self.index, self.name = plan.index, plan.name
        self.buckets = [
            Bucket(
                bucket,
                [params[entry.param.name] for entry in bucket.entries],
                stage,
                comm,
                pool,
                precision,
                host,
                on_sealed_access=lambda: on_sealed_access(self),
                may_convert=lambda: self.on_convert(self),
            )
            for bucket in plan.buckets
        ]
        self.is_local = all(bucket.grads.is_local for bucket in self.buckets)
        self.trainable = [bucket for bucket in self.buckets if bucket.plan.trainable]
        self.sharded = transition(stage.weights, Placement.REPLICATED) is Transition.GATHER and comm.shard.size > 1
        self.residence = Residence.SHARDED if self.sharded else Residence.GATHERED
        self.holds = 0
        self.pinned = False
        self.on_convert: Callable[[Unit], bool] = lambda unit: False
        self._gathers: list[Work] = []
        self._reductions: list[Work] = []

    def _become(self, residence: Residence) -> None:
        if residence not in _NEXT_RESIDENCES[self.residence]:
            raise AssertionError(f"unit {self.name} is {self.residence.value} and cannot become {residence.value}")
        self.residence = residence

    # -- values come in ---------------------------------------------------------------------------------------------

    def allocate(self) -> None:
        """Make the buffers that rest on this rank. :meth:`finish_load` follows, once they have values."""
        for bucket in self.buckets:
            bucket.weights.allocate()
            bucket.weights.full = None if self.sharded else bucket.weights.resting

    def seal_or_bind(self, bucket: Bucket, entry: Entry) -> None:
        """Bring one parameter, whose values are stored, into the state in which it rests."""
        bucket.seal_or_bind(entry, sealed=self.sharded)

    def finish_load(self) -> None:
        """The values are stored: bring the parameters into the state in which they rest, views or sealed."""
        self.advance_generation()
        for bucket in self.buckets:
            if self.sharded:
                bucket.seal()
            else:
                bucket.bind(bucket.weights.resting)

    def advance_generation(self) -> None:
        """The weights have changed."""
        for bucket in self.buckets:
            bucket.weights.generation += 1

    # -- uses -------------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """A use begins: the unit is not resharded before :meth:`unhold`."""
        self.holds += 1

    def unhold(self) -> None:
        """A use is over. :meth:`reshard` may follow."""
        if not self.holds:
            raise AssertionError(f"unit {self.name} is not in use")
        self.holds -= 1

    # -- unshard, reshard -------------------------------------------------------------------------------------------

    def unshard(self) -> None:
        """Start the all-gather of the weights, unless they are here or on their way."""
        if self.residence is not Residence.SHARDED:
            return
        for bucket in self.buckets:
            self._gathers.append(bucket.weights.start_gather(self.index))
        self._become(Residence.GATHERING)

    def join_unshard(self) -> None:
        """Take part in an all-gather for ranks that need it, and drop what comes. What is here stays as it is."""
        for bucket in self.buckets:
            bucket.weights.join_gather(self.index)

    def wait_for_unshard(self) -> None:
        """Return when the full weights are here and the parameters show them."""
        self.unshard()
        if self.residence is Residence.GATHERED:
            return
        self._wait_for_gathers()
        for bucket in self.buckets:
            full = bucket.weights.full
            if full is None:
                raise AssertionError(f"unit {self.name} was gathered, and its weights are not here")
            self.pool.label(full, (self, bucket))
            bucket.bind(full)
        self._become(Residence.GATHERED)

    def _wait_for_gathers(self) -> None:
        while self._gathers:
            self._gathers.pop().wait()

    def reshard(self) -> None:
        """Drop the full weights, unless they rest in full or are in use. In-place edits of them are kept."""
        if not self.sharded or self.holds or self.pinned or self.residence is Residence.SHARDED:
            return
        if self.residence is Residence.GATHERED:
            self._keep_edits()
        self._wait_for_gathers()
        self._drop_full()

    def seal_keeping_buffer(self) -> None:
        """Seal the parameters although their full weights stay, for a use that comes soon: it needs no gather."""
        if self.sharded and not self.holds and not self.pinned and self.residence is Residence.GATHERED:
            self._keep_edits()
            for bucket in self.buckets:
                bucket.seal()
            self._become(Residence.GATHERED_SEALED)

    def _keep_edits(self) -> None:
        for bucket in self.buckets:
            bucket.edits.adopt_gathered()

    def _drop_full(self) -> None:
        for bucket in self.buckets:
            bucket.seal()
            bucket.weights.drop_full()
        self._become(Residence.SHARDED)
        self.pinned = False

    def detach_params(self) -> None:
        """Give the parameters tensors of their own; the unit is not used any more. Collective where it is sharded."""
        self.wait_for_unshard()
        for bucket in self.buckets:
            bucket.detach_params()

    # -- edits ------------------------------------------------------------------------------------------------------

    def edited(self) -> list[str]:
        """Names of the parameters that were changed since they were last shown."""
        return [name for bucket in self.buckets for name in bucket.edits.edited_names()]

    def restore_views(self) -> None:
        """Make parameters that a forward or backward converted views again."""
        for bucket in self.buckets:
            bucket.edits.restore_views()

    def check_in_place(self) -> None:
        """See that no parameter's tensor was replaced while it is shown; see :meth:`Edits.check_in_place`."""
        if self.residence is Residence.GATHERED:
            for bucket in self.buckets:
                bucket.edits.check_in_place()

    def adopt_edits(self, *, restorable: bool) -> None:
        """Notice edits that were made to resting weights; see :meth:`Edits.adopt_resting`."""
        if not self.sharded:
            for bucket in self.buckets:
                bucket.edits.adopt_resting(restorable=restorable)

    def forget_before_edit(self) -> None:
        """Training goes on from the weights as they are now: no earlier masters will be asked for."""
        for bucket in self.buckets:
            if bucket.weights.before_edit is not None:
                if not self.sharded:
                    bucket.edits.adopt_resting(restorable=False)
                bucket.weights.before_edit = None

    def note_versions(self) -> None:
        """Take the weights as they are now for unedited."""
        for bucket in self.buckets:
            bucket.edits.note_versions()

    def write_back(self) -> None:
        """Bring edits of the gathered weights into shards and masters: rank 0's values win on every rank."""
        if self.residence is not Residence.GATHERED:
            raise AssertionError(f"unit {self.name} is {self.residence.value}, so there is nothing to write back")
        changed = []
        for bucket in self.buckets:
            full, resting, own = bucket.weights.full, bucket.weights.resting, bucket.shard.own
            if full is None:
                raise AssertionError(f"unit {self.name} shows no weights")
            bucket.edits.check_in_place()
            self.comm.messages.broadcast([full])
            changed.append(not torch.equal(own(full), own(resting)))
            bucket.edits.write(full, restorable=True)
            bucket.edits.note_versions()
        # What autograd saved before is stale on all ranks if one shard changed, and on none if nothing did.
        for bucket, found in zip(self.buckets, zip(*self.comm.messages.exchange(changed), strict=True), strict=True):
            bucket.weights.generation += any(found)

    def refresh(self) -> list[Work]:
        """After an update: bring the masters into the weights, and start the gather where these rest in full.

        A gathered copy of sharded weights is now of an older generation and is dropped.
        """
        if self.holds:
            raise UsageError(
                f"step() was called while unit {self.name!r} is in use. Call it outside of forward and of "
                f"gathered_parameters()."
            )
        if not self.trainable:
            return []
        works = []
        for bucket in self.trainable:
            weights = bucket.weights
            weights.refresh(self.index)
            if transition(self.stage.states, self.stage.weights) is Transition.GATHER:
                works.append(self.comm.gathers.gather(self.index, weights.resting, bucket.plan.cuts))
            weights.generation += 1
        self.reshard()
        return works

    # -- gradients --------------------------------------------------------------------------------------------------

    def has_uncollected(self) -> bool:
        """Whether any parameter has a ``.grad`` that was not collected yet."""
        return any(bucket.grads.has_uncollected() for bucket in self.trainable)

    def has_partial(self) -> bool:
        """Whether gradients of this rank wait for a reduction."""
        return any(bucket.grads.partial is not None for bucket in self.trainable)

    def accumulate(self, factor: float) -> None:
        """Collect this rank's gradients, times ``factor``, without communication."""
        for bucket in self.trainable:
            bucket.grads.accumulate(factor)

    def reduce_scatter(self, factor: float) -> None:
        """Collect this rank's gradients and start to sum them over the ranks. Absent ones count as zero."""
        for bucket in self.trainable:
            self._reductions.append(bucket.grads.reduce_scatter(self.index, factor))

    def has_reduced(self) -> bool:
        """Whether :meth:`wait_for_reduce` would wait for no other rank."""
        return all(work.has_arrived() for work in self._reductions)

    def wait_for_reduce(self) -> None:
        """Return when every started reduction of this unit is complete, or on its way down to the host."""
        while self._reductions:
            self._reductions.pop(0).wait()

    def wait_for_host(self) -> None:
        """Return when gradients that are on their way down to host memory are there."""
        if self.host is not None:
            self.host.wait_for_copies()

    def gather_grads(self) -> list[Work]:
        """Start to bring reduced gradients here in full, where the states rest so."""
        return [bucket.grads.gather(self.index) for bucket in self.trainable]

    def drop_grads(self) -> None:
        """Discard all gradients of this window, those in flight included."""
        self.wait_for_reduce()
        self.wait_for_host()
        for bucket in self.buckets:
            bucket.grads.drop()
