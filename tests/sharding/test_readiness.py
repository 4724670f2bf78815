"""Which units are complete after which hint."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from shardline.sharding.readiness import Readiness


def ready_for(calls: list[list[int]]) -> tuple[Readiness, list[Any]]:
    """A backward that begins after forwards of one unit for each list, with so many inputs in each call."""
    units: list[Any] = [SimpleNamespace(index=index) for index in range(len(calls))]
    readiness = Readiness(units)
    for unit, inputs in zip(units, calls, strict=True):
        for count in inputs:
            readiness.use_in_forward(unit)
            readiness.expect_gradients(unit, count)
    readiness.begin()
    return readiness, units


def complete(readiness: Readiness, unit: Any, at_once: bool = True) -> list[int]:
    return [each.index for each in readiness.input_complete(unit, at_once=at_once)]


@pytest.mark.parametrize("inputs", [[1], [2], [1, 1], [2, 3]])
def test_a_unit_is_complete_with_the_last_input_of_its_last_call(inputs: list[int]) -> None:
    readiness, (unit,) = ready_for([inputs])
    for _ in range(sum(inputs) - 1):
        assert complete(readiness, unit) == [] and not readiness.is_ready(0)
    assert complete(readiness, unit) == [0] and readiness.is_ready(0) and readiness.was_complete(unit)


def test_a_leafs_hint_counts_from_the_next_event() -> None:
    readiness, (a, b, c) = ready_for([[1], [1], [1]])
    assert complete(readiness, a, at_once=False) == []
    assert complete(readiness, b) == [0, 1], "in the order of the hints"
    assert complete(readiness, c, at_once=False) == []
    assert list(readiness.use_in_backward(c)) == [], "its own use is no other event"
    assert [unit.index for unit in readiness.use_in_backward(a)] == [2]


def test_a_call_without_inputs_is_complete_at_the_end_only() -> None:
    readiness, (unit,) = ready_for([[0, 1]])
    assert complete(readiness, unit) == [] and not readiness.is_ready(0)
    readiness.complete_all()
    assert readiness.is_ready(0) and not readiness.was_complete(unit)


def test_hints_of_a_unit_that_were_wrong_tell_nothing() -> None:
    readiness, (unit, unused) = ready_for([[1], []])
    readiness.wrong_hints.update({0, 1})
    assert complete(readiness, unit) == [] and not readiness.is_ready(0)
    assert not readiness.is_ready(unused.index), "not even that it was not used"


def test_what_no_forward_used_is_ready_with_zeros_unless_backward_uses_it() -> None:
    readiness, (_, unused) = ready_for([[1], []])
    assert readiness.is_ready(1) and not readiness.is_ready(0)
    list(readiness.use_in_backward(unused))
    assert not readiness.is_ready(1)


def test_without_a_forward_nothing_is_unused() -> None:
    """The second backward of one graph."""
    readiness, _ = ready_for([[], []])
    assert not readiness.is_ready(0)


def test_the_end_of_a_backward_forgets_its_graph() -> None:
    readiness, (unit,) = ready_for([[2]])
    ended: list[int] = []
    readiness.call_at_end(lambda: ended.append(1))
    complete(readiness, unit)
    readiness.end()
    assert ended == [1] and not readiness.expects_backward(unit)
    readiness.expect_gradients(unit, 1)
    assert complete(readiness, unit) == [], "torch.autograd.grad completes inputs outside of backward"
