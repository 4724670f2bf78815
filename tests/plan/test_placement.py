"""The stage table and the transition table, against the columns of DESIGN.md, section 1."""

from __future__ import annotations

from itertools import product

import pytest

from shardline.plan.placement import STAGES, Placement, Transition, transition

R, S, P = Placement.REPLICATED, Placement.SHARDED, Placement.PARTIAL

TABLE = """
    0 R P R
    1 R P S
    2 R S S
    3 S S S
"""  # stage, weights, gradients between micro-steps, masters and optimizer state


def test_stages_are_the_rows_of_the_table() -> None:
    rows = [(str(s.number), s.weights.value, s.gradients.value, s.states.value) for s in STAGES]
    assert rows == [tuple(line.split()) for line in TABLE.strip().splitlines()]


def test_a_row_is_found_by_what_differs() -> None:
    assert [stage.keeping_weights.number for stage in STAGES] == [0, 1, 2, 2]
    assert [stage.sharding_states.number for stage in STAGES] == [1, 1, 2, 3]


def holdings(placement: Placement, ranks: int) -> list[set[tuple[int, int]]]:
    """Which (element, contributing rank) pairs each rank holds of a buffer of one element per rank."""
    everything = set(product(range(ranks), range(ranks)))
    return {
        R: [everything] * ranks,
        S: [{(rank, other) for other in range(ranks)} for rank in range(ranks)],
        P: [{(element, rank) for element in range(ranks)} for rank in range(ranks)],
    }[placement]


def reduce_scatter(held: list[set[tuple[int, int]]]) -> list[set[tuple[int, int]]]:
    together = set.union(*held)
    return [{(element, other) for element, other in together if element == rank} for rank in range(len(held))]


def all_gather(held: list[set[tuple[int, int]]]) -> list[set[tuple[int, int]]]:
    return [set.union(*held)] * len(held)


COLLECTIVES = {"reduce": reduce_scatter, "gather": all_gather}


@pytest.mark.parametrize(("source", "target"), [(a, b) for a in (R, S, P) for b in (R, S, P) if a is P or b is not P])
def test_a_transition_gives_every_rank_what_its_target_holds(source: Placement, target: Placement) -> None:
    """Played through on sets of (element, whose contribution): no collective missing, none too many."""
    held = holdings(source, 3)
    for operation in transition(source, target).collectives:
        before, held = held, COLLECTIVES[operation](held)
        assert held != before, f"{operation} moved nothing"
    assert all(wanted <= have for wanted, have in zip(holdings(target, 3), held, strict=True))


@pytest.mark.parametrize("source", [R, S])
def test_nothing_becomes_a_partial_sum(source: Placement) -> None:
    with pytest.raises(KeyError):
        transition(source, P)


def test_an_all_reduce_is_a_reduction_and_then_a_gather() -> None:
    assert transition(P, R) is Transition.REDUCE_GATHER
    assert transition(P, R).collectives == transition(P, S).collectives + transition(S, R).collectives
