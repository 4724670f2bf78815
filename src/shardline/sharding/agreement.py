"""What ranks have agreed on: the orders of passes, and in which steps they do not rely on them.

It changes at the end of a negotiated pass and at a step, on all ranks alike. What a rank did in a negotiated pass is a
:class:`PassRecord`; where all ranks made the same, it becomes the order of the next passes of its kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from shardline.comm import digest
from shardline.sharding.negotiation import Negotiation
from shardline.sharding.orders import Order, fill_in
from shardline.sharding.unit import Unit

__all__ = ["Agreement", "Kind", "PassRecord", "Signature"]

_END_OF_FORWARD, _BEGIN_OF_BACKWARD, _END_OF_BACKWARD = range(3)

_MOST_NEGOTIATED = 8
"""Steps that are negotiated before an order is followed again, where ranks keep differing: as many as they differed."""


class Kind(Enum):
    """Passes that may follow one order."""

    FORWARD = "a forward"
    EVALUATION = "a forward without gradients"
    BACKWARD = "a backward"
    ACCUMULATION = "a backward that does not reduce"

    @property
    def is_forward(self) -> bool:
        return self in (Kind.FORWARD, Kind.EVALUATION)


@dataclass(frozen=True)
class Signature:
    """What is known of a pass before it runs, on all ranks alike. Passes of one signature may follow one order.

    A backward needs other weights than the one before it where it belongs to other forwards, or where it goes on into
    what the model was given: then the first layer's, too.

    Attributes:
        kind: of the pass.
        forwards: how many the model has run since the last backward, for a backward.
        into_inputs: whether any was given what requires a gradient.
    """

    kind: Kind
    forwards: int = 0
    into_inputs: bool = False


@dataclass(frozen=True)
class PassRecord:
    """What this rank did in a negotiated pass.

    Attributes:
        signature: of the pass.
        nth: its number, from 0, among the passes of its signature in the step.
        events: as :class:`Order` has them.
        kept: units that were not released before the end of the pass.
        uses: units that the forwards since the last backward used, in order.
        no_input_grads: those of them none of whose inputs required a gradient: backward ends in them.
        last: the unit that the last forward used last.
        reductions: how many were started.
    """

    signature: Signature
    nth: int
    events: tuple[int, ...]
    kept: frozenset[int]
    uses: tuple[int, ...]
    no_input_grads: frozenset[int]
    last: int | None
    reductions: int

    @cached_property
    def digest(self) -> int:
        """What ranks compare."""
        return digest(self.events, self.uses, sorted(self.no_input_grads), [-1 if self.last is None else self.last])


class Agreement:
    """The orders that all ranks of one engine share.

    Attributes:
        last: the sharded unit that forwards use last, as a set of one or none.
        reduce_order: of the next negotiated backward.
        left_order: whether this rank left an order in this step.
    """

    def __init__(self, units: Sequence[Unit], negotiation: Negotiation, *, prefetch: bool) -> None:
        self._units, self._negotiation, self._prefetch = units, negotiation, prefetch
        self._sharded = [unit.index for unit in units if unit.sharded]
        self._orders: dict[Signature, list[Order | None]] = {}  # by the pass's number among its like in the step
        self._passes: Counter[Signature] = Counter()  # of this step
        self._negotiated_steps = 0  # how many are to come
        self._disagreements = 0
        self._differed = False  # ranks did, in this step
        self.last = frozenset(self._sharded[-1:])
        self.reduce_order = [unit.index for unit in reversed(units) if unit.trainable]
        self.left_order = False

    # -- a pass -----------------------------------------------------------------------------------------------------

    def order(self, signature: Signature) -> Order | None:
        """The order for the next such pass: that of its number in the step; for a forward else the last before.

        The order of a backward leaves out what it did not need, which another one may: as the second of one graph.
        """
        known, nth = self._orders.get(signature), self._passes[signature]
        if self._negotiated_steps or self._differed or not known:
            return None
        if nth >= len(known) and not signature.kind.is_forward:
            return None
        return known[min(nth, len(known) - 1)]

    def begin(self, signature: Signature) -> int:
        """Such a pass begins. Returns its number among its like in the step."""
        self._passes[signature] += 1
        return self._passes[signature] - 1

    def follow_forward(self, uses: Sequence[int]) -> None:
        """Before a negotiated backward: units get ready in the reverse of the forward, if all ranks made the same."""
        if self._negotiation.wait_at(_BEGIN_OF_BACKWARD, 0, digest(uses)) and uses:
            plan = [unit.index for unit in reversed(self._units) if unit.trainable]
            used = [index for index in reversed(uses) if index in plan]
            self.reduce_order = fill_in(used, set(plan) - set(used), plan)

    def conclude(self, record: PassRecord) -> None:
        """Compare what ranks did in a negotiated pass, and remember it where they did the same. Collective."""
        kind, nth = record.signature.kind, record.nth
        point = _END_OF_FORWARD if kind.is_forward else _END_OF_BACKWARD
        alike = self._negotiation.wait_at(point, record.reductions, record.digest)
        known = self._orders.setdefault(record.signature, [])
        known += [None] * (nth + 1 - len(known))
        if not alike and not self._sharded:  # ranks can differ only in when their units are ready
            known[nth] = Order(tuple(~index for index in self.reduce_order))
            return
        self._differed = self._differed or not alike
        known[nth] = self._order_of(record) if alike else None
        if alike and kind is Kind.FORWARD and record.last is not None:
            self.last = frozenset([record.last]) & set(self._sharded)
        if alike and kind is Kind.BACKWARD:
            self.reduce_order = [~event for event in record.events if event < 0]

    def _order_of(self, record: PassRecord) -> Order | None:
        """The order of a pass that all ranks saw alike. One that did not use all units is not followed in evaluations:
        to gather the others as well would cost more than to negotiate."""
        kind, events = record.signature.kind, record.events
        # Only what a backward could have needed, with another loss: it leaves out what none does, as an embedding.
        left_out = () if kind.is_forward else record.no_input_grads
        idle = [index for index in self._sharded if index not in events and index not in left_out]
        if kind is Kind.EVALUATION and idle:
            return None
        # Of what was kept in this pass it is not known whether it was used again.
        return Order.of(
            events,
            idle,
            self._negotiation.repeated | record.kept if kind.is_forward else (),
            plan=self._sharded if kind.is_forward else self._sharded[::-1],
            prefetch=self._prefetch,
        )

    def differ(self) -> None:
        """Ranks requested different units, and all know it."""
        self._differed = True

    # -- a step -----------------------------------------------------------------------------------------------------

    def end_step(self) -> bool:
        """A step ends, on all ranks alike. Returns whether this rank left an agreed order in it."""
        if self._differed:
            self._disagree()
        else:
            self._negotiated_steps = max(0, self._negotiated_steps - 1)
        left_order, self.left_order, self._differed = self.left_order, False, False
        self._passes.clear()
        return left_order

    def negotiate_next(self, *, ending: bool = False) -> None:
        """Some rank left an agreed order, or had late gradients, and all know it. The next step is negotiated.

        Args:
            ending: whether :meth:`end_step` follows at once, so that the next step is the one after it.
        """
        self._disagree()
        self._negotiated_steps += ending

    def _disagree(self) -> None:
        self._disagreements += 1
        self._negotiated_steps = min(self._disagreements, _MOST_NEGOTIATED)
