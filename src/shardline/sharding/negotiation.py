"""Messages between ranks while they are not known to run the same path.

Messages go in rounds. In each, every rank requests a unit, or reports that it waits for a reduction, or that it is done
with the pass; then all ranks gather the requested units, one after the other. A rank that does not need a unit takes
part in its gather and drops it. A pass is over when all ranks are done with it in the same round.

This cannot deadlock. A rank that computes takes part in the next round; all ranks issue the gathers of a round in one
order, which follows from its messages; and a rank waits for a reduction only when every rank has issued it. Of the
ranks that wait to learn that, the one with the fewest reductions issued has all of its own issued everywhere, so it
continues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from shardline.errors import DisagreementError
from shardline.sharding.unit import Unit

__all__ = ["Negotiation"]

_WAITING = -1
_DONE = -2  # minus the index in POINTS

POINTS = ("the end of a forward", "the beginning of a backward", "the end of a backward")


class _Message(NamedTuple):
    """What one rank sends in a round.

    Attributes:
        requested: the index of a unit (plus the number of units, if it is a repeated use), ``_WAITING``, or ``_DONE``
            and below.
        issued: reductions that the rank has issued in this backward.
        digest: of what it did in the pass that is over; else 0.
    """

    requested: int
    issued: int
    digest: int = 0


class Negotiation:
    """The rounds of one schedule.

    Attributes:
        repeated: units that some rank has used again in a forward after it had resharded them. The same on all ranks.
    """

    def __init__(self, units: Sequence[Unit], all_gather_ints: Callable[[Sequence[int]], list[list[int]]]) -> None:
        self._units, self._all_gather_ints = units, all_gather_ints
        self._issued = [0]  # by each rank in this backward, as of the last round
        self._broken = False
        self.repeated: set[int] = set()

    def request(self, unit: Unit, issued: int = 0, *, again: bool = False) -> bool:
        """Wait until ``unit`` is here. Returns whether every rank requested the same.

        Args:
            issued: how many reductions this rank has issued in this backward.
            again: whether it was used, and resharded, in this forward before.
        """
        messages = self._round(_Message(unit.index + again * len(self._units), issued))
        unit.wait_for_unshard()
        return all(message.requested == messages[0].requested for message in messages)

    def reduced(self, number: int, issued: int) -> None:
        """Wait until every rank has issued its reduction ``number`` of this backward."""
        while min(self._issued) <= number:
            self._round(_Message(_WAITING, issued))

    def wait_at(self, point: int, issued: int, digest: int) -> bool:
        """Wait until every rank is at ``point`` (of :data:`POINTS`). Returns whether all have the same ``digest``.

        Raises:
            DisagreementError: if ranks are at different points: one has run fewer passes.
        """
        if self._broken:
            return False
        while True:
            messages = self._round(_Message(_DONE - point, issued, digest))
            found = {message.requested: rank for rank, message in enumerate(messages) if message.requested <= _DONE}
            if len(found) > 1:
                (one, first), (other, second) = sorted(found.items(), key=lambda item: item[1])[:2]
                self._broken = True
                raise DisagreementError(
                    f"rank {first} is at {POINTS[_DONE - one]}, rank {second} at {POINTS[_DONE - other]}. Every rank "
                    f"must run the same sequence of forwards and backwards; run forwards that differ inside "
                    f"engine.gathered_parameters()."
                )
            if all(message.requested <= _DONE for message in messages):
                return all(message.digest == messages[0].digest for message in messages)

    def _round(self, own: _Message) -> list[_Message]:
        """Exchange messages, and start the gathers that they request. Returns those of all ranks, by rank."""
        try:
            messages = [_Message(*row) for row in self._all_gather_ints(own)]
            self._issued = [message.issued for message in messages]
            count = len(self._units)
            requests = [message.requested for message in messages if message.requested >= 0]
            for index in dict.fromkeys(requested % count for requested in requests):
                if own.requested >= 0 and index == own.requested % count:
                    self._units[index].unshard()
                else:
                    self._units[index].join_unshard()
            self.repeated |= {requested - count for requested in requests if requested >= count}
        except BaseException:
            self._broken = True  # the other ranks do not see this error, and take no part in a later round
            raise
        return messages
