"""Which collectives a pass, a forward or a backward, issues next: by an agreed order, or negotiated.

Two ranks that gather units of one size in different orders would swap weights without any error, and two that wait for
different collectives deadlock. So all ranks issue the same collectives: either all follow one
:class:`~shardline.sharding.orders.Order` exactly, whatever they need themselves, or they have just agreed on the next.

A pass yields the collectives that are due, as functions, and the schedule calls them. This separates the order from the
collectives, and keeps the stack between a module's hook and its all-gather short.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial

from shardline.errors import DisagreementError
from shardline.sharding.negotiation import Negotiation
from shardline.sharding.orders import Order
from shardline.sharding.reduce_queue import ReduceQueue
from shardline.sharding.unit import Residence, Unit

__all__ = ["Followed", "Issue", "Negotiated", "Pass"]

Issue = Callable[[], None]
"""Starts one collective."""


class Pass:
    """A pass without communication: all weights are here, or there is a single process.

    The caller iterates what the methods return to its end, and calls each :data:`Issue` as it comes.

    Args:
        kept: units that are not released before the pass is over.

    Attributes:
        left_order: whether this rank needed something else than an agreed order says.
    """

    left_order = False

    def __init__(self, kept: Collection[int] = ()) -> None:
        self.kept = kept

    def unshard(self, unit: Unit, *, again: bool = False) -> Iterable[Issue]:
        """Gather ``unit`` if needed and wait for it. ``again``: note if it is used a second time in this pass."""
        unit.wait_for_unshard()
        return ()

    def reshard(self, unit: Unit) -> None:
        """A use of ``unit`` is over."""
        if unit.index not in self.kept:
            unit.reshard()

    def post_backward(self, unit: Unit) -> Iterable[Issue]:
        """The gradients of ``unit`` are complete: issue the reductions that this makes due."""
        return ()

    def finish(self) -> Iterable[Issue]:
        """Issue all that is left."""
        return ()


class Negotiated(Pass):
    """A pass of ranks that are not known to be alike.

    Attributes:
        events: the gathers and reductions that this rank needed, as :class:`Order` has them.
    """

    def __init__(
        self,
        negotiation: Negotiation,
        units: Sequence[Unit],
        kept: Collection[int] = (),
        queue: ReduceQueue | None = None,
        order: Sequence[int] = (),
        ready: Callable[[int], bool] = bool,
        factor: float = 1.0,
    ) -> None:
        super().__init__(kept)
        self._negotiation, self._units = negotiation, units
        self._queue, self._order, self._ready, self._factor = queue, order, ready, factor
        self._gathers = any(unit.sharded for unit in units)
        self._seen: set[int] = set()
        self.events: list[int] = []

    @property
    def issued(self) -> int:
        """Reductions so far."""
        return 0 if self._queue is None else self._queue.issued

    def unshard(self, unit: Unit, *, again: bool = False) -> Iterable[Issue]:
        known = unit.index in self._seen
        if unit.residence is not Residence.SHARDED:  # also from before this pass
            if not known:
                self.events.append(unit.index)
            unit.wait_for_unshard()
        else:
            self.events.append(unit.index)
            self._negotiation.request(unit, self.issued, again=again and known)
        self._seen.add(unit.index)
        return ()

    def reshard(self, unit: Unit) -> None:
        if self._queue is not None or unit.index not in self._negotiation.repeated:
            super().reshard(unit)

    def post_backward(self, unit: Unit) -> Iterator[Issue]:
        self._note(unit.index)
        if self._queue is None:
            return
        while self.issued < len(self._order) and self._ready(self._order[self.issued]):
            self._note(self._order[self.issued])
            turn = self._units[self._order[self.issued]]
            self._queue.admit(turn, self._wait)
            yield partial(turn.reduce_scatter, self._factor)
            self.reshard(turn)

    def finish(self) -> Iterator[Issue]:
        if self._queue is not None:
            for index in self._order[self.issued :]:
                yield from self.post_backward(self._units[index])

    def _note(self, index: int) -> None:
        if ~index not in self._seen:
            self._seen.add(~index)
            self.events.append(~index)

    def _wait(self, number: int, unit: Unit) -> None:
        """Before a wait for a reduction: other ranks may still need gathers before they can issue it."""
        if self._gathers:
            self._negotiation.reduced(number, self.issued)


class Followed(Pass):
    """A pass by an agreed order.

    A rank that uses units in another order still issues what the others issue, in the same order: gathers that it does
    not need now, whose weights it keeps up to ``max_live`` elements, since it may need them later; and reductions, with
    zeros for gradients that it does not have yet.

    Args:
        carried_over: units that are gathered on every rank before this pass: their first gather is left out.
        prefetch: whether gathers begin one use ahead.
        max_live: how many elements of weights to keep that were gathered for other ranks.
        queue: of reductions, in a backward that reduces.
        ready: whether a unit can be reduced.
    """

    def __init__(
        self,
        order: Order,
        units: Sequence[Unit],
        kept: Collection[int],
        *,
        carried_over: Collection[int],
        prefetch: bool,
        max_live: int,
        queue: ReduceQueue | None = None,
        ready: Callable[[int], bool] = bool,
        factor: float = 1.0,
    ) -> None:
        super().__init__(kept)
        self.order, self._units = order, units
        self._carried_over = set(carried_over)
        self._prefetch, self._max_live = prefetch, max_live
        self._queue, self._ready, self._factor = queue, ready, factor
        self._position = 0
        self._gathered: set[int] = set()
        self._prefetched: Unit | None = None  # gathered for the next use
        self._spare: dict[Unit, None] = {}  # gathered and not in use, oldest first

    def unshard(self, unit: Unit, *, again: bool = False) -> Iterator[Issue]:
        if unit.residence is Residence.GATHERED and unit is not self._prefetched:
            return
        if unit is self._prefetched:
            self._prefetched = None
        elif unit.residence is Residence.SHARDED:
            yield from self._gather_in_order(unit)
        self.left_order = self.left_order or unit.index in self.order.idle
        unit.wait_for_unshard()
        yield from self._run()

    def reshard(self, unit: Unit) -> None:
        if self.left_order:
            self._keep(unit)
        else:
            super().reshard(unit)

    def post_backward(self, unit: Unit) -> Iterator[Issue]:
        return self._run()

    def finish(self) -> Iterator[Issue]:
        self._drop_prefetched()
        events = self.order.events
        while self._position < len(events):
            event = events[self._position]
            self._position += 1
            if event < 0:
                yield from self._reduce(~event)
            elif event in self._carried_over:
                self._carried_over.discard(event)
            else:
                self.left_order = self.left_order or event not in self.order.idle
                unit = self._units[event]
                keeps = event in self.kept and unit.residence is Residence.SHARDED
                yield unit.unshard if keeps else unit.join_unshard

    def _run(self) -> Iterator[Issue]:
        """Issue the next events of the order, as far as they wait for nothing; gathers at most one use ahead."""
        events = self.order.events
        while self._position < len(events):
            event = events[self._position]
            if event < 0:
                if not self._ready(~event):
                    return
                self._position += 1
                yield from self._reduce(~event)
                continue
            if event in self._carried_over or event in self.order.idle:
                self._position += 1
                yield from self._join_skipped(event)
                continue
            if not self._prefetch or self._prefetched is not None or event in self._gathered:
                return
            self._position += 1
            self._gathered.add(event)
            self._prefetched = self._units[event]
            yield self._prefetched.unshard

    def _gather_in_order(self, unit: Unit) -> Iterator[Issue]:
        """Issue everything in the order up to the gather of ``unit``, and that gather."""
        events = self.order.events
        try:
            place = events.index(unit.index, self._position)
        except ValueError:
            raise self._refusal(unit) from None
        while self._position <= place:
            event = events[self._position]
            self._position += 1
            if event < 0:
                self.left_order = self.left_order or not self._ready(~event)
                yield from self._reduce(~event)
            elif event != unit.index:
                self.left_order = self.left_order or not (event in self.order.idle or event in self._carried_over)
                yield from self._join_skipped(event)
            else:
                if event not in self._gathered:
                    self._drop_prefetched()
                self._gathered.add(event)
                if event in self._carried_over:  # the others have it already, so they issue no gather of it
                    raise self._refusal(unit)
                yield unit.unshard

    def _join_skipped(self, index: int) -> Iterator[Issue]:
        """Take part in a gather that this rank does not need now."""
        unit = self._units[index]
        if index in self._carried_over:
            self._carried_over.discard(index)
            return
        self._gathered.add(index)
        if unit.residence is not Residence.SHARDED:
            yield unit.join_unshard
            return
        yield unit.unshard
        self._keep(unit)

    def _reduce(self, index: int) -> Iterator[Issue]:
        unit = self._units[index]
        if self._queue is not None:
            if not self._ready(index):
                self._queue.forced.add(index)
            self._queue.admit(unit)
            yield partial(unit.reduce_scatter, self._factor)
            self.reshard(unit)

    def _keep(self, unit: Unit) -> None:
        if unit.index in self.kept:
            return
        self._spare.pop(unit, None)
        self._spare[unit] = None
        while sum(each.plan.numel for each in self._spare) > self._max_live:
            oldest = next(iter(self._spare))
            del self._spare[oldest]
            oldest.reshard()

    def _drop_prefetched(self) -> None:
        """Another unit is used than the one that was prefetched."""
        if self._prefetched is not None:
            self.left_order = True
            unit, self._prefetched = self._prefetched, None
            self._keep(unit)

    def _refusal(self, unit: Unit) -> DisagreementError:
        needed = "is needed again after it was released" if unit.index in self.order.events else "is needed"
        return DisagreementError(
            f"unit {unit.name!r} {needed}, which is not in the order that all ranks agreed on for this pass, so the "
            f"other ranks do not send it. Run forwards that use a module a different number of times by rank, or from "
            f"step to step, inside engine.gathered_parameters()."
        )
