"""The stage table and the transition table: the placements of each ZeRO stage, and the collectives that change them.

A tensor is in one of three placements over the ranks of a group. A **stage** is a row of :data:`STAGES` that says in
which placement weights, gradients and optimizer state rest; :func:`transition` says which collectives a change of
placement needs. All of the engine's communication follows from these two tables (Rajbhandari et al. 2020, "ZeRO").
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["STAGES", "Placement", "Stage", "Transition", "transition"]


class Placement(Enum):
    """How the elements of one flat buffer lie over the ranks of a group."""

    REPLICATED = "R"  # every rank holds all elements
    SHARDED = "S"  # every rank holds its own range
    PARTIAL = "P"  # every rank holds all elements, and the true value is the sum over ranks


class Transition(Enum):
    """The collectives that a change of placement needs, in the order they run."""

    NONE = ""  # not an empty tuple, of which Python 3.11.2 makes another value
    GATHER = "gather"  # all-gather
    REDUCE = "reduce"  # reduce-scatter
    REDUCE_GATHER = "reduce gather"  # together an all-reduce

    @property
    def collectives(self) -> list[str]:
        """Their names, in order."""
        return self.value.split()


_R, _S, _P = Placement.REPLICATED, Placement.SHARDED, Placement.PARTIAL

_TRANSITIONS = {
    (_R, _R): Transition.NONE,
    (_S, _S): Transition.NONE,
    (_P, _P): Transition.NONE,
    (_R, _S): Transition.NONE,  # a local view
    (_S, _R): Transition.GATHER,
    (_P, _S): Transition.REDUCE,
    (_P, _R): Transition.REDUCE_GATHER,
}


def transition(source: Placement, target: Placement) -> Transition:
    """Return what it takes to bring a buffer from ``source`` to ``target``.

    Raises:
        KeyError: for a change that has no meaning (nothing becomes a partial sum by communication).
    """
    return _TRANSITIONS[source, target]


@dataclass(frozen=True)
class Stage:
    """One row of the stage table: the placements in which a unit's buffers rest.

    Attributes:
        number: the ZeRO stage, 0 to 3.
        weights: the compute weights between two uses.
        gradients: the accumulated gradients between two micro-steps.
        states: fp32 masters and optimizer state; also what gradients become at the accumulation boundary.
    """

    number: int
    weights: Placement
    gradients: Placement
    states: Placement

    @property
    def keeping_weights(self) -> Stage:
        """The row that differs in its weights, which rest in full: stage 2 for stage 3, else this one."""
        return _row_of(Placement.REPLICATED, self.gradients, self.states)

    @property
    def sharding_states(self) -> Stage:
        """The row that differs in its states, which rest sharded: stage 1 for stage 0, else this one."""
        return _row_of(self.weights, self.gradients, Placement.SHARDED)


STAGES: tuple[Stage, ...] = (
    Stage(0, weights=_R, gradients=_P, states=_R),
    Stage(1, weights=_R, gradients=_P, states=_S),
    Stage(2, weights=_R, gradients=_S, states=_S),
    Stage(3, weights=_S, gradients=_S, states=_S),
)


def _row_of(weights: Placement, gradients: Placement, states: Placement) -> Stage:
    return next(row for row in STAGES if (row.weights, row.gradients, row.states) == (weights, gradients, states))
