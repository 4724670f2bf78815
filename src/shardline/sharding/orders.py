"""The order of the collectives of one pass (a forward or a backward): a value that ranks agree on and then follow."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Order", "fill_in"]


@dataclass(frozen=True)
class Order:
    """The collectives that every rank issues in a pass, one after the other.

    It holds every sharded unit, so that a rank which uses one that all had skipped does not gather it alone.

    Attributes:
        events: unit index ``u`` for its gather, ``~u`` (negative) for its reduction.
        idle: units that no rank used. They are gathered nevertheless, for a rank that may use them.
        kept: units that are not released before the pass is over.
    """

    events: tuple[int, ...]
    idle: frozenset[int] = frozenset()
    kept: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls,
        events: Sequence[int],
        idle: Sequence[int],
        kept: Collection[int] = (),
        *,
        plan: Sequence[int],
        prefetch: bool,
    ) -> Order:
        """The order made from ``events``, as every rank recorded them.

        Args:
            idle: units that no rank used; each is inserted at its place in ``plan``, an order of all units.
            kept: units to gather once, although ``events`` may gather them again.
            prefetch: whether gathers begin one use ahead.
        """
        order: list[int] = []
        for event in events:
            if event not in kept or event not in order:
                order.append(event)
        order = fill_in(order, idle, plan)
        if prefetch:
            order = _move_gathers_up(order, frozenset(idle))
        return cls(tuple(order), frozenset(idle), frozenset(kept))


def fill_in(order: Sequence[int], missing: Collection[int], plan: Sequence[int]) -> list[int]:
    """``order`` with the gathers of ``missing`` units: each before its reduction, else behind the unit it follows in
    ``plan``."""
    filled, place = list(order), 0
    for index in plan:
        if index not in missing:
            if index in filled:
                place = len(filled) - filled[::-1].index(index)
            continue
        if ~index in filled:
            place = filled.index(~index)
        filled.insert(place, index)
        place += 1
    return filled


def _move_gathers_up(events: Sequence[int], idle: Collection[int]) -> list[int]:
    """Each first gather moved to directly behind the gather before it, so that it runs while that unit is used."""
    seen: set[int] = set(idle)
    slots = []
    for place, event in enumerate(events):
        if event >= 0 and event not in seen:
            seen.add(event)
            slots.append(place)
    follower = dict(pairwise(slots))
    moved: list[int] = []
    for place, event in enumerate(events):
        if place not in slots or place == slots[0]:
            moved.append(event)
        if place in follower:
            moved.append(events[follower[place]])
    return moved
