"""What ranks have agreed on: the orders of passes, and the steps in which passes are negotiated nevertheless.

It changes only at the end of a negotiated pass and at a step, on all ranks alike. A rank records a negotiated pass as a
:class:`PassRecord`. If all ranks recorded the same, it becomes the order of the next passes of its signature.
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
"""The most steps in a row to negotiate where ranks keep differing: their number is that of the steps that differed."""


class Kind(Enum):
    """The kinds of passes. Passes of different kinds never follow the same order."""

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

    Two backwards need different weights if they belong to different forwards, or if only one of them computes the
    gradients of the model's inputs: it needs the first layer's weights, too.

    Attributes:
        kind: of the pass.
        forwards: for a backward: how many forwards the model has run since the last one.
        into_inputs: whether an input of any of them requires a gradient.
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
        events: gathers and reductions, as :class:`Order` has them.
        kept: units that were not released before the end of the pass.
        uses: units that the forwards since the last backward used, in order.
        no_input_grads: those of ``uses`` of which no input required a gradient: backward ends in them.
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
        self._orders: dict[
            Signature, list[Order | None]
        ] = {}  # by the number of the pass among those of its signature in the step
        self._passes: Counter[Signature] = Counter()  # of this step
        self._negotiated_steps = 0  # how many are to come
        self._disagreements = 0
        self._differed = False  # ranks did, in this step
        self.last = frozenset(self._sharded[-1:])
        self.reduce_order = [unit.index for unit in reversed(units) if unit.trainable]
        self.left_order = False

    # -- a pass -----------------------------------------------------------------------------------------------------

    def order(self, signature: Signature) -> Order | None:
        """The order for the next pass of ``signature``: that of the same number in the step.

        A forward without one follows the forward before it. A backward does not: an order of a backward leaves out the
        gathers that it did not need, and another backward (a second one of the same graph) may need them.
        """
        known, nth = self._orders.get(signature), self._passes[signature]
        if self._negotiated_steps or self._differed or not known:
            return None
        if nth >= len(known) and not signature.kind.is_forward:
            return None
        return known[min(nth, len(known) - 1)]

    def begin(self, signature: Signature) -> int:
        """A pass begins. Returns its number, from 0, among those of its signature in the step."""
        self._passes[signature] += 1
        return self._passes[signature] - 1

    def follow_forward(self, uses: Sequence[int]) -> None:
        """Before a negotiated backward: reduce in the reverse of the forward, if it was the same on all ranks."""
        if self._negotiation.wait_at(_BEGIN_OF_BACKWARD, 0, digest(uses)) and uses:
            plan = [unit.index for unit in reversed(self._units) if unit.trainable]
            used = [index for index in reversed(uses) if index in plan]
            self.reduce_order = fill_in(used, set(plan) - set(used), plan)

    def conclude(self, record: PassRecord) -> None:
        """Compare what ranks did in a negotiated pass; if all did the same, that is its order. Collective."""
        kind, nth = record.signature.kind, record.nth
        point = _END_OF_FORWARD if kind.is_forward else _END_OF_BACKWARD
        alike = self._negotiation.wait_at(point, record.reductions, record.digest)
        known = self._orders.setdefault(record.signature, [])
        known += [None] * (nth + 1 - len(known))
        if not alike and not self._sharded:  # without gathers, ranks differ only in when their units were ready
            known[nth] = Order(tuple(~index for index in self.reduce_order))
            return
        self._differed = self._differed or not alike
        known[nth] = self._order_of(record) if alike else None
        if alike and kind is Kind.FORWARD and record.last is not None:
            self.last = frozenset([record.last]) & set(self._sharded)
        if alike and kind is Kind.BACKWARD:
            self.reduce_order = [~event for event in record.events if event < 0]

    def _order_of(self, record: PassRecord) -> Order | None:
        """The order of a pass that was the same on all ranks.

        None for an evaluation that left units out: an order gathers every unit, which costs more than to negotiate.
        """
        kind, events = record.signature.kind, record.events
        # A backward with another loss may need a unit that this one did not; no backward needs, say, an embedding.
        left_out = () if kind.is_forward else record.no_input_grads
        idle = [index for index in self._sharded if index not in events and index not in left_out]
        if kind is Kind.EVALUATION and idle:
            return None
        # Units that were kept in this pass may have been used again without a second gather.
        return Order.of(
            events,
            idle,
            self._negotiation.repeated | record.kept if kind.is_forward else (),
            plan=self._sharded if kind.is_forward else self._sharded[::-1],
            prefetch=self._prefetch,
        )

    def differ(self) -> None:
        """Ranks requested different units in one round, which all ranks have seen."""
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
        """All ranks have learned that one left an agreed order or had late gradients: negotiate the next step.

        Args:
            ending: whether :meth:`end_step` follows at once, so that the next step is the one after it.
        """
        self._disagree()
        self._negotiated_steps += ending

    def _disagree(self) -> None:
        self._disagreements += 1
        self._negotiated_steps = min(self._disagreements, _MOST_NEGOTIATED)
