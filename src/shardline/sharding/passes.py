"""How the collectives of one pass, a forward or a backward, are issued: by an agreed order, or negotiated.

Two ranks that gather units of one size in different orders would swap weights without any error, and two that wait for
different collectives wait for ever. So what is issued is the same on all ranks, either because all follow one
:class:`~shardline.sharding.orders.Order` to the letter, whatever they need themselves, or because they have just said
so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence

from shardline.errors import DisagreementError
from shardline.sharding.negotiation import Negotiation
from shardline.sharding.orders import Order
from shardline.sharding.unit import Residence, Unit

__all__ = ["Negotiated", "Pass", "Reductions", "Replayed"]


class Reductions:
    """The reductions of one backward. Those on their way are together no larger than the largest unit.

    Attributes:
        issued: how many were started in this backward.
        forced: units that were reduced before this rank had their gradients.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self._largest = max((unit.plan.numel for unit in units), default=0)
        self._in_flight: deque[tuple[int, Unit]] = deque()
        self.issued = 0
        self.forced: set[int] = set()

    def begin(self) -> None:
        """A backward begins. What an earlier one that failed has left is on its way on all ranks, or never."""
        self._in_flight = deque((-1, unit) for _, unit in self._in_flight)
        self.issued = 0
        self.forced.clear()

    def issue(self, unit: Unit, factor: float, wait: Callable[[int, Unit], None] | None = None) -> None:
        """Start to reduce ``unit``. ``wait(number, unit)`` comes before the wait for an earlier one."""
        while self._in_flight and sum(each.plan.numel for _, each in self._in_flight) + unit.plan.numel > self._largest:
            number, oldest = self._in_flight.popleft()
            if wait is not None:
                wait(number, oldest)
            oldest.wait_for_reduce()
        unit.reduce_scatter(factor)
        self._in_flight.append((self.issued, unit))
        self.issued += 1

    def let_go(self) -> None:
        """Give back what reductions that are over held, before the next gradients take memory."""
        while self._in_flight and self._in_flight[0][1].has_reduced():
            self._in_flight.popleft()[1].wait_for_reduce()

    def finish(self) -> None:
        """Return when everything that was reduced has arrived."""
        while self._in_flight:
            self._in_flight.popleft()[1].wait_for_reduce()


class Pass:
    """A pass in which nothing travels: all is here, or everybody is alone.

    Args:
        stays: units that are not released before the pass is over.
    """

    def __init__(self, stays: Collection[int] = ()) -> None:
        self.stays = stays

    def bring(self, unit: Unit, *, again: bool = False) -> None:
        """Return when ``unit`` is here. ``again``: by a use of which a second one in the pass is to be remembered."""
        unit.wait_for_unshard()

    def let_go(self, unit: Unit) -> None:
        """A use of ``unit`` is over."""
        if unit.index not in self.stays:
            unit.reshard()

    def advance(self, unit: Unit) -> None:
        """The gradients of ``unit`` are complete: issue what has waited for that."""

    def drain(self) -> None:
        """Issue all that is left."""


class Negotiated(Pass):
    """A pass of ranks that are not known to be alike.

    Attributes:
        events: what an order would have to hold, as seen by this rank; see :class:`Order`.
    """

    def __init__(
        self,
        negotiation: Negotiation,
        units: Sequence[Unit],
        stays: Collection[int] = (),
        reductions: Reductions | None = None,
        order: Sequence[int] = (),
        ready: Callable[[int], bool] = bool,
        factor: float = 1.0,
    ) -> None:
        super().__init__(stays)
        self._negotiation, self._units = negotiation, units
        self._reductions, self._order, self._ready, self._factor = reductions, order, ready, factor
        self._gathers = any(unit.sharded for unit in units)
        self._seen: set[int] = set()
        self.events: list[int] = []

    @property
    def issued(self) -> int:
        return 0 if self._reductions is None else self._reductions.issued

    def bring(self, unit: Unit, *, again: bool = False) -> None:
        known = unit.index in self._seen
        if unit.residence is not Residence.SHARDED:  # also from before this pass
            if not known:
                self.events.append(unit.index)
            unit.wait_for_unshard()
        else:
            self.events.append(unit.index)
            self._negotiation.want(unit, self.issued, again=again and known)
        self._seen.add(unit.index)

    def let_go(self, unit: Unit) -> None:
        if self._reductions is not None or unit.index not in self._negotiation.repeated:
            super().let_go(unit)

    def advance(self, unit: Unit) -> None:
        self._note(unit.index)
        if self._reductions is None:
            return
        while self.issued < len(self._order) and self._ready(self._order[self.issued]):
            self._note(self._order[self.issued])
            turn = self._units[self._order[self.issued]]
            self._reductions.issue(turn, self._factor, self._wait)
            self.let_go(turn)

    def drain(self) -> None:
        if self._reductions is not None:
            for index in self._order[self.issued :]:
                self.advance(self._units[index])

    def _note(self, index: int) -> None:
        if ~index not in self._seen:
            self._seen.add(~index)
            self.events.append(~index)

    def _wait(self, number: int, unit: Unit) -> None:
        """Before a wait for a reduction: others may still need gathers to come to it."""
        if self._gathers:
            self._negotiation.reduced(number, self.issued)


class Replayed(Pass):
    """A pass by an agreed order.

    A rank that needs units otherwise issues all the same what the others issue, and in the same order: gathers that it
    passes over, which it keeps while there is room, since it may merely need them later; and reductions, with zeros for
    gradients that it does not have yet.

    Attributes:
        left: whether this rank needed something else than the order says.
    """

    def __init__(
        self,
        order: Order,
        units: Sequence[Unit],
        stays: Collection[int],
        *,
        here: Collection[int],
        prefetch: bool,
        room: int,
        reductions: Reductions | None = None,
        ready: Callable[[int], bool] = bool,
        factor: float = 1.0,
    ) -> None:
        super().__init__(stays)
        self.order, self._units = order, units
        self._here = set(here)  # on every rank, from before this pass: the first gather is none
        self._prefetch, self._room = prefetch, room
        self._reductions, self._ready, self._factor = reductions, ready, factor
        self.left = False
        self._position = 0
        self._gathered: set[int] = set()
        self._ahead: Unit | None = None  # on its way, for the next use
        self._kept: dict[Unit, None] = {}  # oldest first

    def bring(self, unit: Unit, *, again: bool = False) -> None:
        if unit.residence is Residence.GATHERED and unit is not self._ahead:
            return
        if unit is self._ahead:
            self._ahead = None
        elif unit.residence is Residence.SHARDED:
            self._catch_up(unit)
        self.left = self.left or unit.index in self.order.idle
        unit.wait_for_unshard()
        self._run()

    def let_go(self, unit: Unit) -> None:
        if self.left:
            self._keep(unit)
        else:
            super().let_go(unit)

    def advance(self, unit: Unit) -> None:
        self._run()

    def drain(self) -> None:
        self._drop_ahead()
        events = self.order.events
        while self._position < len(events):
            event = events[self._position]
            self._position += 1
            if event < 0:
                self._reduce(~event)
            elif event in self._here:
                self._here.discard(event)
            else:
                self.left = self.left or event not in self.order.idle
                unit = self._units[event]
                if event in self.stays and unit.residence is Residence.SHARDED:
                    unit.unshard()
                else:
                    unit.join_unshard()

    def _run(self) -> None:
        """Issue what follows, as far as it waits for nothing: one gather ahead of its use."""
        events = self.order.events
        while self._position < len(events):
            event = events[self._position]
            if event < 0:
                if not self._ready(~event):
                    return
                self._position += 1
                self._reduce(~event)
                continue
            if event in self._here or event in self.order.idle:
                self._position += 1
                self._gather(event)
                continue
            if not self._prefetch or self._ahead is not None or event in self._gathered:
                return
            self._position += 1
            self._gathered.add(event)
            self._ahead = self._units[event]
            self._ahead.unshard()

    def _catch_up(self, unit: Unit) -> None:
        """Issue all that comes before the gather of ``unit``, and that."""
        events = self.order.events
        try:
            place = events.index(unit.index, self._position)
        except ValueError:
            raise self._refusal(unit) from None
        while self._position <= place:
            event = events[self._position]
            self._position += 1
            if event < 0:
                self.left = self.left or not self._ready(~event)
                self._reduce(~event)
            elif event != unit.index:
                self.left = self.left or not (event in self.order.idle or event in self._here)
                self._gather(event)
            else:
                if event not in self._gathered:
                    self._drop_ahead()
                self._gathered.add(event)
                if event in self._here:  # it was, and this rank has let it go
                    raise self._refusal(unit)
                unit.unshard()

    def _gather(self, index: int) -> None:
        """Take part in a gather that this rank does not need now."""
        unit = self._units[index]
        if index in self._here:
            self._here.discard(index)
            return
        self._gathered.add(index)
        if unit.residence is not Residence.SHARDED:
            unit.join_unshard()
            return
        unit.unshard()
        self._keep(unit)

    def _reduce(self, index: int) -> None:
        unit = self._units[index]
        if self._reductions is not None:
            if not self._ready(index):
                self._reductions.forced.add(index)
            self._reductions.issue(unit, self._factor)
            self.let_go(unit)

    def _keep(self, unit: Unit) -> None:
        if unit.index in self.stays:
            return
        self._kept.pop(unit, None)
        self._kept[unit] = None
        while sum(each.plan.numel for each in self._kept) > self._room:
            oldest = next(iter(self._kept))
            del self._kept[oldest]
            oldest.reshard()

    def _drop_ahead(self) -> None:
        """What was to be used next is not."""
        if self._ahead is not None:
            self.left = True
            unit, self._ahead = self._ahead, None
            self._keep(unit)

    def _refusal(self, unit: Unit) -> DisagreementError:
        return DisagreementError(
            f"unit {unit.name!r} is needed again after it was released: all ranks had run this pass alike, without "
            f"that, so the other ranks do not send it. Run forwards that use a module a different number of times by "
            f"rank, or from step to step, inside engine.gathered_parameters()."
        )
