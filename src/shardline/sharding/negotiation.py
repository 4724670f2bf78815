"""Messages between ranks while they are not known to run the same path.

There are rounds. In each, every rank requests a unit, or reports that it waits for a reduction, or that it is done with
the pass; then all gather what was requested, one unit after the other. A rank that does not need a unit takes
part, too, and drops it. A pass is over when all are done with it in the same round.

No rank waits without end. A rank that computes will take part in the next round; gathers are those that all have just
learned of, in one order; and a reduction is waited for only when every rank has issued it. Of the ranks that still wait
for that, the one which has issued the fewest reductions has all of its own issued everywhere, so it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shardline.errors import DisagreementError
from shardline.sharding.unit import Unit

__all__ = ["Negotiation"]

_WAITING = -1
_DONE = -2  # and below, by what is over

POINTS = ("the end of a forward", "the beginning of a backward", "the end of a backward")


class Negotiation:
    """The rounds of one schedule.

    Attributes:
        repeated: units that a rank has used again in a forward after it had resharded them. The same on all ranks.
    """

    def __init__(self, units: Sequence[Unit], ask: Callable[[Sequence[int]], list[list[int]]]) -> None:
        self._units, self._ask = units, ask
        self._issued = [0]  # by each rank in this backward, as of the last round
        self._broken = False
        self.repeated: set[int] = set()

    def request(self, unit: Unit, issued: int = 0, *, again: bool = False) -> bool:
        """Return when ``unit`` is here. Says whether every rank requested just that.

        Args:
            issued: how many reductions this rank has issued in this backward.
            again: whether it was used, and resharded, in this forward before.
        """
        answers = self._round(unit.index + again * len(self._units), issued)
        unit.wait_for_unshard()
        return all(answer[0] == answers[0][0] for answer in answers)

    def reduced(self, number: int, issued: int) -> None:
        """Return when every rank has issued its reduction ``number`` of this backward."""
        while min(self._issued) <= number:
            self._round(_WAITING, issued)

    def wait_at(self, point: int, issued: int, digest: int) -> bool:
        """Return when every rank is at ``point`` (of :data:`POINTS`). Says whether all came with the same ``digest``.

        Raises:
            DisagreementError: if ranks are at different points: one has run fewer passes.
        """
        if self._broken:
            return False
        while True:
            answers = self._round(_DONE - point, issued, digest)
            found = {answer[0]: rank for rank, answer in enumerate(answers) if answer[0] <= _DONE}
            if len(found) > 1:
                (one, first), (other, second) = sorted(found.items(), key=lambda item: item[1])[:2]
                self._broken = True
                raise DisagreementError(
                    f"rank {first} is at {POINTS[_DONE - one]}, rank {second} at {POINTS[_DONE - other]}. Every rank "
                    f"must run the same sequence of forwards and backwards; run forwards that differ inside "
                    f"engine.gathered_parameters()."
                )
            if all(answer[0] <= _DONE for answer in answers):
                return all(answer[2] == answers[0][2] for answer in answers)

    def _round(self, requested: int, issued: int, digest: int = 0) -> list[list[int]]:
        try:
            answers = self._ask((requested, issued, digest))
            self._issued = [answer[1] for answer in answers]
            count = len(self._units)
            for index in dict.fromkeys(answer[0] % count for answer in answers if answer[0] >= 0):
                if requested >= 0 and index == requested % count:
                    self._units[index].unshard()
                else:
                    self._units[index].join_unshard()
            self.repeated |= {answer[0] - count for answer in answers if answer[0] >= count}
        except BaseException:
            self._broken = True  # the other ranks do not know of it, so none of them would answer
            raise
        return answers
