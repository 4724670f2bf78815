"""When units are gathered, released and reduced.

A rank runs passes: forwards with and without gradients, and backwards. The first one of a kind is negotiated with the
other ranks gather by gather; if all turn out to do the same, what they did is the order that the next ones follow, and
nothing is said any more (:mod:`shardline.sharding.passes`). After a step in which ranks differed the next step is
negotiated.

* **gathers** come in the order of their uses.
* **reductions** come in the order in which units get ready, once that was alike on all ranks, at first in the reverse
  of the forward. A unit that is ready early waits for its turn. An unused unit counts as zero gradients.

"Ready" is a hint: the gradient of a unit's inputs is complete, so those of its parameters nearly always are. Gradients
that come later are kept and reduced in a second round at the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from enum import Enum

from shardline.comm import digest
from shardline.sharding.negotiation import Negotiation
from shardline.sharding.orders import Order, fill_in
from shardline.sharding.passes import Negotiated, Pass, Reductions, Replayed
from shardline.sharding.unit import Residence, Unit

__all__ = ["Schedule"]

_END_OF_FORWARD, _BEGIN_OF_BACKWARD, _END_OF_BACKWARD = range(3)

_MOST_DOUBT = 8
"""Steps that are negotiated before an order is followed again, where ranks keep differing: as many as they differed."""


class Kind(Enum):
    """Passes that may follow one order."""

    FORWARD = "a forward"
    EVALUATION = "a forward without gradients"
    BACKWARD = "a backward"
    FOLDING = "a backward that does not reduce"


class _Hints:
    """What is known in one graph about the gradients of one unit."""

    def __init__(self) -> None:
        self.used = False  # in a forward: gradients may come
        self.calls = 0  # forward calls that will have a backward
        self.pending = 0  # inputs of those calls whose gradient is not complete
        self.open_end = False  # a call without differentiable inputs: nothing will tell when it is over


class Schedule:
    """Drives the units of one engine. Hooks tell it what the model does; the engine tells it what the user asks.

    Attributes:
        in_backward: whether a backward of the engine runs.
        reducing: whether this backward's gradients are reduced, or only added up on this rank: in a world of one always
            that.
        factor: what gradients are multiplied by when they are collected.
        untrusted: units whose gradients came after their hint.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        ask: Callable[[Sequence[int]], list[list[int]]],
        *,
        prefetch: bool,
        reshard_after_forward: bool,
        max_kept: int,
        on_host: bool,
    ) -> None:
        self.units = units
        self._negotiation = Negotiation(units, ask)
        self._local = all(unit.is_local for unit in units)  # nothing is ever reduced
        self._prefetch, self._reshard, self._max_kept = prefetch, reshard_after_forward, max_kept
        self._on_host = on_host
        self._sharded = [unit.index for unit in units if unit.sharded]
        self._reduce_order = [unit.index for unit in reversed(units) if unit.trainable]
        # What ranks agree on. It changes at the end of a negotiated pass and at a step, on all of them alike.
        self._orders: dict[Kind, list[Order | None]] = {kind: [] for kind in Kind}  # by the pass's place in its step
        self._last = frozenset(self._sharded[-1:])  # what a forward uses last
        self._resting: set[int] = set()  # what is here between two passes, on every rank
        self._doubt = 0  # steps that are negotiated whole
        self._disagreements = 0
        self._differed = False  # ranks did, in this step
        # What this rank does.
        self._passes: Counter[Kind] = Counter()  # of this step
        self._left = False  # this rank left an order in this step
        self._forward: Pass | None = None
        self._backward = Pass()
        self._running: tuple[Kind, int] = (Kind.FORWARD, 0)
        self._uses: dict[int, None] = {}  # of forwards since the last backward, in order
        self._last_used: int | None = None  # in the forward that runs, or ran last
        self._with_grad = True  # that forward
        self._holding = 0
        self.in_backward = False
        self.reducing = True
        self.factor = 1.0
        self.untrusted: set[int] = set()
        self._reductions = Reductions(units)
        self._hints = [_Hints() for _ in units]
        self._hints_are_fresh = False  # a forward has run since the last backward: this is no second one of a graph
        self._almost_ready: list[Unit] = []
        self._at_end: list[Callable[[], None]] = []
        self._ready: set[int] = set()  # units whose gradients are complete
        self._all_ready = False
        self._converted: list[Unit] = []
        for unit in units:
            unit.on_convert = self._convert

    # -- forward ----------------------------------------------------------------------------------------------------

    def begin_forward(self, *, with_grad: bool) -> None:
        """The model's own forward begins."""
        if self.in_backward or self._forward is not None:
            return
        self._let_go_but(self._resting)
        # A backward begins with what was used last: to let that go would only bring it again.
        stays = frozenset(self._sharded) if not self._reshard else self._last if with_grad else frozenset()
        if all(self.units[index].holds for index in self._sharded):
            self._forward = Pass(stays)
        else:
            self._forward = self._start(Kind.FORWARD if with_grad else Kind.EVALUATION, stays)
        self._last_used, self._with_grad = None, with_grad

    def end_forward(self) -> None:
        """The model's own forward is over, with or without an error."""
        if self.in_backward or self._forward is None:
            return
        current, self._forward = self._forward, None
        try:
            current.drain()
            self._conclude(current, _END_OF_FORWARD)
        finally:
            self._end_conversions()
            stays = self._last & set(current.stays) if self._reshard else current.stays
            self._resting = {index for index in stays if self.units[index].residence is not Residence.SHARDED}
            self._let_go_but(self._resting)
            if self._reshard:
                for index in self._resting:
                    self.units[index].seal_keeping_buffer()

    def use(self, unit: Unit) -> bool:
        """A module that uses ``unit`` begins its forward. Returns whether :meth:`done` must follow."""
        if self.in_backward:  # recomputation under activation checkpointing: backward releases it
            self.need(unit)
            return False
        outermost = not unit.holds
        unit.holds += 1
        self._holding += 1
        self._hints[unit.index].used = self._hints_are_fresh = True
        if outermost:
            self._use(unit)
        return True

    def done(self, unit: Unit) -> None:
        """The forward that began with :meth:`use` is over."""
        unit.holds -= 1
        self._holding -= 1
        if self._converted and self._forward is None and not self._holding and not self.in_backward:
            self._end_conversions()
        if not unit.sharded or unit.holds or self.in_backward:
            return
        if self._forward is not None:
            self._forward.let_go(unit)
        else:
            self._resting.discard(unit.index)
            unit.reshard()

    def touch(self, unit: Unit) -> bool:
        """A sealed parameter of ``unit`` is used outside of its module. Gathers if all ranks can be doing the same."""
        if self.in_backward:
            self.need(unit)
            return True
        if self._forward is None and not self._holding:
            return False
        self._use(unit)
        return True

    def _convert(self, unit: Unit) -> bool:
        """A parameter of ``unit`` is about to be converted. It may, where a forward or backward ends that."""
        if not self.in_backward and self._forward is None and not self._holding:
            return False
        self._converted.append(unit)
        return True

    def _end_conversions(self) -> None:
        while self._converted:
            self._converted.pop().restore_views()

    def _use(self, unit: Unit) -> None:
        if self._forward is not None:
            self._last_used = unit.index
            if self._with_grad:
                self._uses[unit.index] = None
        self._bring(unit, again=True)

    def _bring(self, unit: Unit, *, again: bool = False) -> None:
        current = self._backward if self.in_backward else self._forward
        if not unit.sharded:
            return
        if current is not None:
            current.bring(unit, again=again)
        elif unit.residence is Residence.SHARDED:  # past the model's own forward, where no pass begins or ends
            if self._negotiation.want(unit):
                self._resting.add(unit.index)
            else:
                self._differed = True
        else:
            unit.wait_for_unshard()

    def release_all(self) -> None:
        """Let every unit go that is not in use."""
        self._let_go_but(())

    def _let_go_but(self, stays: Collection[int]) -> None:
        for index in self._sharded:
            if index not in stays:
                self.units[index].reshard()

    # -- agreement --------------------------------------------------------------------------------------------------

    def _known(self, kind: Kind) -> Order | None:
        """The order for the next pass of ``kind``: that of its place in the step; for a forward else the last before.

        The order of a backward leaves out what it did not need, which another one may: as the second of one graph.
        """
        known, place = self._orders[kind], self._passes[kind]
        if self._doubt or self._differed or not known:
            return None
        if place >= len(known) and kind in (Kind.BACKWARD, Kind.FOLDING):
            return None
        return known[min(place, len(known) - 1)]

    def _start(self, kind: Kind, stays: Collection[int] = ()) -> Pass:
        """A pass of ``kind``, by its order if there is one."""
        order = self._known(kind)
        self._running = kind, self._passes[kind]
        self._passes[kind] += 1
        reductions = self._reductions if kind is Kind.BACKWARD else None
        if order is None:
            return Negotiated(
                self._negotiation, self.units, stays, reductions, self._reduce_order, self._is_ready, self.factor
            )
        here = [index for index in self._sharded if self.units[index].residence is not Residence.SHARDED]
        return Replayed(
            order,
            self.units,
            order.stays | frozenset(stays),
            here=here,
            prefetch=self._prefetch,
            room=self._max_kept,
            reductions=reductions,
            ready=self._is_ready,
            factor=self.factor,
        )

    def _conclude(self, current: Pass, point: int) -> None:
        """Everything of a pass was issued: see whether ranks did the same, and remember it."""
        if isinstance(current, Replayed):
            self._left = self._left or current.left
        if not isinstance(current, Negotiated):
            return
        kind, place = self._running
        uses = list(self._uses)
        said = digest(current.events, uses, [-1 if self._last_used is None else self._last_used])
        alike = self._negotiation.settle(point, current.issued, said)
        known = self._orders[kind]
        known += [None] * (place + 1 - len(known))
        if not alike and not self._sharded:  # all that ranks could differ in is when they are ready
            known[place] = Order(tuple(~index for index in self._reduce_order))
            return
        self._differed = self._differed or not alike
        known[place] = self._order(kind, current, uses) if alike else None
        if alike and kind is Kind.FORWARD and self._last_used is not None:
            self._last = frozenset([self._last_used]) & set(self._sharded)
        if alike and kind is Kind.BACKWARD:
            self._reduce_order = [~event for event in current.events if event < 0]

    def _order(self, kind: Kind, current: Negotiated, uses: Sequence[int]) -> Order | None:
        """The order of a pass that all ranks saw alike. One that did not use all units is not followed in evaluations:
        to gather the others as well would cost more than to negotiate."""
        forward = kind in (Kind.FORWARD, Kind.EVALUATION)
        # Only what a backward could have needed: it leaves out what its forward used, such as an embedding.
        idle = [index for index in self._sharded if index not in current.events and (forward or index not in uses)]
        if kind is Kind.EVALUATION and idle:
            return None
        # Of what has stayed in this pass nobody knows whether it was used again.
        return Order.of(
            current.events,
            idle,
            self._negotiation.repeated | set(current.stays) if forward else (),
            plan=self._sharded if forward else self._sharded[::-1],
            ahead=self._prefetch,
        )

    def end_step(self) -> bool:
        """A step ends, on all ranks alike. Says whether this rank left an agreed order in it."""
        if self._differed:
            self._disagree()
        else:
            self._doubt = max(0, self._doubt - 1)
        left, self._left, self._differed = self._left, False, False
        self._passes.clear()
        return left

    def distrust(self, untrusted: Iterable[int] = (), *, ending: bool = False) -> None:
        """Some rank left an agreed order, or had late gradients, and all have heard: the next step is negotiated.

        Args:
            untrusted: units of which any rank had late gradients.
            ending: whether :meth:`end_step` follows at once, so that the next step is the one after it.
        """
        self.untrusted.update(untrusted)
        self._disagree()
        self._doubt += ending

    def _disagree(self) -> None:
        self._disagreements += 1
        self._doubt = min(self._disagreements, _MOST_DOUBT)

    # -- backward ---------------------------------------------------------------------------------------------------

    def begin_backward(self, *, reducing: bool, factor: float) -> None:
        """A backward begins whose gradients are multiplied by ``factor`` and, if ``reducing``, reduced as they come."""
        self.in_backward, self.reducing, self.factor = True, reducing and not self._local, factor
        self._ready, self._all_ready = set(), False
        self._reductions.begin()
        self._let_go_but(self._resting)
        self._resting = set()
        if not self.reducing and not self._sharded:
            self._backward = Pass()
            return
        kind = Kind.BACKWARD if self.reducing else Kind.FOLDING
        if self._known(kind) is None:
            self._follow_forward()
        self._backward = self._start(kind)

    def _follow_forward(self) -> None:
        """Before a negotiated backward: units get ready in the reverse of the forward, if all ranks have seen one."""
        uses = list(self._uses)
        if self._negotiation.settle(_BEGIN_OF_BACKWARD, 0, digest(uses)) and uses:
            plan = [unit.index for unit in reversed(self.units) if unit.trainable]
            used = [index for index in reversed(uses) if index in plan]
            self._reduce_order = fill_in(used, set(plan) - set(used), plan)

    def need(self, unit: Unit) -> None:
        """Backward, or what runs inside it, or ``torch.autograd.grad`` needs the whole weights of ``unit``."""
        if unit not in self._almost_ready:
            self._flush_almost_ready()
        self._hints[unit.index].used = True
        if self._on_host:  # on an accelerator the stream would wait, and not compute meanwhile
            self._reductions.let_go()
        self._bring(unit)

    def expect(self, unit: Unit, inputs: int) -> None:
        """A call of ``unit`` joined the graph; its backward will be over when ``inputs`` gradients are complete."""
        hints = self._hints[unit.index]
        hints.calls += 1
        hints.pending += inputs
        hints.open_end = hints.open_end or not inputs

    def call_at_end(self, call: Callable[[], None]) -> None:
        """Call ``call`` when this backward, or the next, is over."""
        self._at_end.append(call)

    def called(self, unit: Unit) -> bool:
        """Whether a call of ``unit`` is expected to have a backward."""
        return self._hints[unit.index].calls > 0

    def input_ready(self, unit: Unit, *, at_once: bool) -> None:
        """One of the gradients announced by :meth:`expect` is complete.

        Autograd accumulates gradients as soon as it has them, but a leaf's at no certain moment among each other: with
        ``at_once`` false those of the parameters are complete only when anything else happens.
        """
        self._flush_almost_ready()
        hints = self._hints[unit.index]
        hints.pending -= 1
        if self.in_backward and not hints.pending and not hints.open_end and unit.index not in self.untrusted:
            if at_once:
                self._unit_ready(unit)
            else:
                self._almost_ready.append(unit)

    def _flush_almost_ready(self) -> None:
        while self._almost_ready:
            self._unit_ready(self._almost_ready.pop(0))

    def _unit_ready(self, unit: Unit) -> None:
        if unit.index in self._ready:
            return
        self._ready.add(unit.index)
        if unit.trainable and self.reducing:
            self._backward.advance(unit)
            return
        if unit.trainable:
            unit.accumulate(self.factor)
        self._backward.let_go(unit)

    def _is_ready(self, index: int) -> bool:
        """Whether the gradients of a unit are complete. One that was not used is ready with zeros."""
        unused = self._hints_are_fresh and not self._hints[index].used and index not in self.untrusted
        return self._all_ready or index in self._ready or unused

    def end_backward(self) -> None:
        """Backward is over: collect what no hint announced, in order, on every rank alike."""
        self._flush_almost_ready()
        self._all_ready = True
        self._backward.drain()
        for unit in self.units:
            if not self.reducing and unit.index not in self._ready:
                unit.accumulate(self.factor)
            elif unit.has_uncollected():
                if unit.index not in self._reductions.forced:
                    self.untrusted.add(unit.index)
                unit.accumulate(self.factor)
        self._conclude(self._backward, _END_OF_BACKWARD)
        self.finish_reductions()
        self._leave_backward()

    def abort_backward(self) -> None:
        """An error ended backward: what it showed of the orders is not whole."""
        self._leave_backward()

    def _leave_backward(self) -> None:
        """Nothing of this backward's graph is expected any more."""
        self.in_backward = False
        self._backward = Pass()
        self._end_conversions()
        self._almost_ready.clear()
        while self._at_end:
            self._at_end.pop()()
        self._hints, self._hints_are_fresh = [_Hints() for _ in self.units], False
        self._uses.clear()
        self.release_all()

    def finish_reductions(self) -> None:
        """Return when everything that was reduced has arrived."""
        self._reductions.finish()

    def reduce_now(self, units: Iterable[Unit]) -> None:
        """Reduce what ``units`` hold, outside of a backward; every rank gives the same units in the same order."""
        for unit in units:
            unit.reduce_scatter(1.0)
            unit.wait_for_reduce()
