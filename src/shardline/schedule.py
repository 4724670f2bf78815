"""When units are gathered, released and reduced, in orders that are the same on all ranks.

Two ranks that gather units of one size in different orders would swap weights without any error, so the order of
collectives is agreed, never improvised:

* **gather order**: the order in which a forward uses the units, and the one in which its backward needs them. At first
  the plan's and its reverse; later what every rank recorded alike. In a forward with gradients, and in a backward, a
  rank that jumps ahead first issues the gathers it skipped, and at the end the rest.
* **reduce order**: at first the reverse of the plan, later the order in which units became ready, if all ranks saw the
  same. A unit that is ready early waits for its turn. An unused unit counts as zero gradients.

"Ready" is a hint: the gradient of a unit's inputs is complete, so those of its parameters nearly always are. Gradients
that come later are kept and reduced in a second round at the step.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from shardline.comm import digest
from shardline.unit import Residence, Unit

__all__ = ["Record", "Schedule"]

_SHORT, _LONG, _NAP = 0.02, 2.0, 5e-5
"""Seconds to wait for a reduction before it looks as if another rank waited for a gather: where orders are known to be
alike it is much more likely just slow."""


@dataclass(frozen=True)
class Record:
    """The orders of one step on this rank, as unit indices."""

    uses: tuple[int, ...] = ()  # of the last forward with gradients
    needs: tuple[int, ...] = ()  # of the last backward
    ready: tuple[int, ...] = ()

    def digest(self) -> int:
        return digest(self.uses, self.needs, self.ready)


class _Walk:
    """A position in an agreed order of gathers. What was issued is not issued again, even if it was released since."""

    def __init__(
        self, order: Sequence[int], *, strict: bool, here: Collection[int] = (), stays: Collection[int] = ()
    ) -> None:
        self.order, self.strict = order, strict
        self.here = here  # units that need no gather, on any rank: they have stayed from what came before
        self.stays = stays  # units that are not released, on any rank: what follows needs them
        self.position = 0  # what is before it was used, or passed over
        self.issued = 0  # the gathers before it were started: at most one ahead of ``position``

    def find(self, unit: int) -> int | None:
        """Where ``unit`` stands, not before the position."""
        try:
            return self.order.index(unit, self.position)
        except ValueError:
            return None


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
    """

    def __init__(
        self,
        units: Sequence[Unit],
        all_alike: Callable[[list[int]], bool],
        *,
        prefetch: bool,
        reshard_after_forward: bool,
        max_kept: int,
        on_host: bool,
    ) -> None:
        self.units = units
        self._all_alike = all_alike  # whether every rank has the same list; collective
        self._local = all(unit.local for unit in units)  # nothing is ever reduced
        self._on_host = on_host
        self._first = True  # no backward has run yet
        self._alike = False  # all ranks have last used their units in the same order
        self._max_kept = max_kept  # elements of units that were gathered for other ranks' sake
        self._kept: deque[Unit] = deque()
        self.in_backward = False
        self.reducing = True
        self.factor = 1.0
        self._prefetch, self._reshard = prefetch, reshard_after_forward
        self._sharded = [unit.index for unit in units if unit.sharded]
        self._forward_order = list(self._sharded)
        self._backward_order = self._forward_order[::-1]
        self._reduce_order = [unit.index for unit in reversed(units) if unit.trainable]
        self._use_counts: Counter[int] | None = None  # uses of each unit in a recorded forward
        self._last_used = self._forward_order[-1:]  # one unit, or none
        self._largest = max((unit.plan.numel for unit in units), default=0)
        # Units whose modules lie apart, or that are used outside of their modules, stay until the forward ends.
        self._scattered = {unit.index for unit in units if not _compact(unit)}
        self._walk: _Walk | None = None  # of the forward that runs
        self._back = _Walk((), strict=True)
        self._uses: list[int] = []
        self._done: Counter[int] = Counter()
        self._needs: dict[int, None] = {}  # unit indices, in order
        self._hints = [_Hints() for _ in units]
        self._almost_ready: list[Unit] = []
        self._at_end: list[Callable[[], None]] = []
        self._untrusted: set[int] = set()  # units whose gradients came after their hint
        self._ready: dict[int, None] = {}  # unit indices, in order
        self._turn = 0
        self._in_flight: deque[tuple[Unit, _Walk]] = deque()
        self._holding = 0
        self._converted: list[Unit] = []
        for unit in units:
            unit.on_convert = self._convert

    # -- forward ----------------------------------------------------------------------------------------------------

    def begin_forward(self, *, with_grad: bool) -> None:
        """The model's own forward begins."""
        if self.in_backward or self._walk is not None:
            return
        # A backward begins with what was used last: to let that go would only bring it again.
        stays = self._sharded if not self._reshard else self._last_used if with_grad else ()
        self._walk = _Walk(self._forward_order, strict=with_grad, here=self._resident(), stays=stays)
        self._uses, self._done = ([] if with_grad else self._uses), Counter()

    def end_forward(self) -> None:
        """The model's own forward is over, with or without an error."""
        if self.in_backward or self._walk is None:
            return
        walk = self._walk
        self._catch_up(walk, len(walk.order), keep=False)
        self._walk = None
        self._end_conversions()
        self.release_all(but=walk.stays)
        if self._reshard:
            for index in walk.stays:
                self.units[index].hide()

    def use(self, unit: Unit) -> bool:
        """A module that uses ``unit`` begins its forward. Returns whether :meth:`done` must follow."""
        if self.in_backward:  # recomputation under activation checkpointing: backward releases it
            self.need(unit)
            return False
        outermost = not unit.holds
        unit.holds += 1
        self._holding += 1
        self._hints[unit.index].used = True
        if outermost:
            self._record_use(unit)
            if unit.sharded:
                self._bring(unit, self._walk)
        return True

    def done(self, unit: Unit) -> None:
        """The forward that began with :meth:`use` is over."""
        unit.holds -= 1
        self._holding -= 1
        if self._converted and self._walk is None and not self._holding and not self.in_backward:
            self._end_conversions()
        if not unit.sharded or unit.holds or self.in_backward:
            return
        if self._walk is None:
            if unit.index not in self._scattered:
                unit.release()
            return
        self._done[unit.index] += 1
        if self._use_counts is None or unit.index not in self._use_counts:
            last = unit.index not in self._scattered
        else:
            last = self._done[unit.index] >= self._use_counts[unit.index]
        if last and unit.index not in self._walk.stays:
            unit.release()

    def touch(self, unit: Unit) -> bool:
        """A sealed parameter of ``unit`` is used outside of its module. Gathers if all ranks can be doing the same."""
        if self.in_backward:
            self.need(unit)
            return True
        if self._walk is None and not self._holding:
            return False
        self._scattered.add(unit.index)
        self._record_use(unit)
        self._bring(unit, self._walk)
        return True

    def _convert(self, unit: Unit) -> bool:
        """A parameter of ``unit`` is about to be converted. It may, where a forward or backward ends that."""
        if not self.in_backward and self._walk is None and not self._holding:
            return False
        self._converted.append(unit)
        return True

    def _end_conversions(self) -> None:
        while self._converted:
            self._converted.pop().take_back()

    def _record_use(self, unit: Unit) -> None:
        if self._walk is not None and self._walk.strict:
            self._uses.append(unit.index)

    def _bring(self, unit: Unit, walk: _Walk | None) -> None:
        """Gather ``unit`` after everything that comes before it in the agreed order, and start the one behind it."""
        place = None if walk is None else walk.find(unit.index)
        if walk is None or place is None:
            unit.wait()
            return
        self._catch_up(walk, place)
        walk.issued = max(walk.issued, place + 1)
        unit.wait()
        walk.position = place + 1
        if self._prefetch and walk.issued == walk.position < len(walk.order):
            self.units[walk.order[walk.position]].gather()
            walk.issued += 1

    def _catch_up(self, walk: _Walk, place: int, *, keep: bool = True) -> None:
        """Take part in the gathers before ``place``, which other ranks need and this one does not, or not yet.

        With ``keep`` what comes is kept while there is room: if this rank merely uses its units in another order, it
        needs no gather of its own for them.
        """
        for position in range(walk.position, place if walk.strict else walk.position):
            unit = self.units[walk.order[position]]
            if position >= walk.issued:
                if unit.index not in walk.here:
                    unit.gather()
                walk.issued = position + 1
            if unit.residence is Residence.GATHERING:
                unit.wait()
            if keep:
                self._kept.append(unit)
            elif unit.index not in walk.stays:
                unit.release()
        walk.position = place
        while sum(unit.plan.numel for unit in self._kept) > self._max_kept:
            self._kept.popleft().release()

    def release_all(self, but: Collection[int] = ()) -> None:
        """Let every unit go that is not in use, ``but`` some."""
        self._kept.clear()
        for unit in self.units:
            if unit.index not in but:
                unit.release()

    def _resident(self) -> set[int]:
        """Sharded units whose whole weights are here, or on their way."""
        return {index for index in self._sharded if self.units[index].residence is not Residence.SHARDED}

    # -- backward ---------------------------------------------------------------------------------------------------

    def begin_backward(self, *, reducing: bool, factor: float) -> None:
        """A backward begins whose gradients are multiplied by ``factor`` and, if ``reducing``, reduced as they come."""
        if self._first:
            self._first = False
            self._follow_first_forward()
        self.in_backward, self.reducing, self.factor = True, reducing and not self._local, factor
        self._back = _Walk(self._backward_order, strict=True, here=self._resident())
        self._needs, self._ready, self._turn = {}, {}, 0

    def need(self, unit: Unit) -> None:
        """Backward (or what runs inside it) needs the whole weights of ``unit``."""
        if unit not in self._almost_ready:
            self._flush_almost_ready()
        if self._on_host:  # on an accelerator the stream would wait, and not compute meanwhile
            self._let_go()
        if not unit.sharded:
            return
        if not self.in_backward:  # torch.autograd.grad within a forward
            unit.wait()
            return
        self._needs[unit.index] = None
        self._bring(unit, self._back)

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
        if self.in_backward and not hints.pending and not hints.open_end and unit.index not in self._untrusted:
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
        self._ready[unit.index] = None
        if not unit.trainable:
            unit.release()
        elif not self.reducing:
            unit.fold(self.factor)
            unit.release()
        else:
            self._advance()

    def _advance(self) -> None:
        """Reduce what is ready and at its turn. A unit that was not used is ready with zeros."""
        while self._turn < len(self._reduce_order):
            unit = self.units[self._reduce_order[self._turn]]
            if unit.index not in self._ready:
                if self._hints[unit.index].used or unit.index in self._untrusted:
                    return
                self._ready[unit.index] = None
            self._turn += 1
            while self._in_flight and self._flying() + unit.plan.numel > self._largest:
                self._finish(*self._in_flight.popleft())
            unit.reduce(self.factor)
            self._in_flight.append((unit, self._back))
            unit.release()

    def _flying(self) -> int:
        """Elements of the reductions that are started and not over: with the next at most those of one large unit."""
        return sum(unit.plan.numel for unit, _ in self._in_flight)

    def _let_go(self) -> None:
        """Give back what reductions that are over held, before the next gradients take memory."""
        while self._in_flight and self._in_flight[0][0].has_reduced():
            self._in_flight.popleft()[0].finish_reduce()

    def _finish(self, unit: Unit, back: _Walk) -> None:
        """Wait for a reduction. The other ranks join it once they have what they gather before: so join that first.

        What that is, one cannot know of a rank that uses its units in another order. So while it takes long, join the
        next gather, and the next, as far as there is room to keep what comes.
        """
        place = back.find(unit.index)
        if place is not None:
            self._catch_up(back, place + 1)
        patience = _LONG if self._alike else _SHORT
        until = time.monotonic() + patience
        while not unit.has_reduced() and back.position < len(back.order):
            ahead = self.units[back.order[back.position]]
            if sum(each.plan.numel for each in (*self._kept, ahead)) > self._max_kept:
                break
            time.sleep(_NAP)
            if time.monotonic() > until:
                self._catch_up(back, back.position + 1)
                until = time.monotonic() + patience
        unit.finish_reduce()

    def end_backward(self) -> None:
        """Backward is over: collect what no hint announced, in order, on every rank alike."""
        self._flush_almost_ready()
        for index in self._reduce_order:
            if index not in self._ready:
                self._ready[index] = None
                if not self.reducing:
                    self.units[index].fold(self.factor)
        if self.reducing:
            self._advance()
        for unit in self.units:
            if unit.has_grad():
                self._untrusted.add(unit.index)
                unit.fold(self.factor)
        self._catch_up(self._back, len(self._back.order), keep=False)
        self.finish_reductions()
        self._leave_backward()

    def abort_backward(self) -> None:
        """An error ended backward: what it showed of the orders is not whole."""
        self._ready, self._needs = {}, {}
        self._leave_backward()

    def _leave_backward(self) -> None:
        """Nothing of this backward's graph is expected any more."""
        self.in_backward = False
        self._end_conversions()
        self._almost_ready.clear()
        while self._at_end:
            self._at_end.pop()()
        self._hints = [_Hints() for _ in self.units]
        self.release_all()

    def finish_reductions(self) -> None:
        """Return when everything that was reduced has arrived."""
        while self._in_flight:
            self._in_flight.popleft()[0].finish_reduce()

    def reduce_now(self, units: Iterable[Unit]) -> None:
        """Reduce what ``units`` hold, outside of a backward; every rank gives the same units in the same order."""
        for unit in units:
            unit.reduce(1.0)
            unit.finish_reduce()

    def _follow_first_forward(self) -> None:
        """Before the first backward: its orders are the reverse of the forward just seen, if all ranks saw the same."""
        self._alike = bool(self._uses) and self._all_alike(self._uses)
        if self._alike:
            self.adopt(Record(tuple(self._uses)))
            behind = list(dict.fromkeys(reversed(self._uses)))
            self._backward_order = self._forward_order[::-1]
            self._reduce_order = list(dict.fromkeys([*behind, *self._reduce_order]))
            self._reduce_order = [index for index in self._reduce_order if self.units[index].trainable]

    # -- agreement --------------------------------------------------------------------------------------------------

    def record(self) -> Record:
        """The orders seen since the last step, to compare with the other ranks'."""
        return Record(tuple(self._uses), tuple(self._needs), tuple(self._ready))

    def distrust(self) -> None:
        """Ranks recorded different orders: the agreed ones stay, and somebody may not follow them."""
        self._alike = False

    def adopt(self, record: Record) -> None:
        """Every rank recorded the same: follow it from now on. Every rank calls this at the same place.

        An order always holds every sharded unit, so that a rank which suddenly uses one that all had skipped does not
        gather alone. Only a backward leaves out what its forward used and it did not need (an embedding).
        """
        self._alike = True
        sharded = self._sharded
        if record.uses:
            used = [index for index in record.uses if self.units[index].sharded]
            self._forward_order = list(dict.fromkeys([*used, *sharded]))
            self._last_used = used[-1:]
            self._use_counts = Counter(record.uses)
        if record.needs:
            unused = [index for index in reversed(sharded) if index not in record.uses]
            self._backward_order = list(dict.fromkeys([*record.needs, *unused]))
        if record.ready:
            self._reduce_order = [index for index in record.ready if self.units[index].trainable]


def _compact(unit: Unit) -> bool:
    """Whether all users of a unit lie inside one module, so that its forward spans every use."""
    roots = unit.plan.roots
    inside = roots[0] + "." if roots[0] else ""
    return len(roots) == 1 and all(user == roots[0] or user.startswith(inside) for user in unit.plan.users)
