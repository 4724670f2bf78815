"""The accumulation window as a state machine, and its divisor against arithmetic by hand."""

from __future__ import annotations

import pytest

from shardline.sharding.window import Gradients, State, Window


def micro_step(window: Window, share: float = 1.0, weight: float | None = None, *, reducing: bool = True) -> None:
    window.begin_forward()
    window.begin_backward(share, reducing=reducing)
    window.add_step(share, weight, samples=4)


def test_a_window_passes_its_states_in_order() -> None:
    window = Window(2)
    assert window.state is State.EMPTY and window.at_start and not window.is_open and not window.at_boundary
    window.hand_out()
    window.hand_out()
    assert window.state is State.HANDED_OUT and window.at_start and window.is_open
    window.begin_forward()
    assert window.state is State.FORWARD and not window.at_start and window.gradients is Gradients.NONE
    window.begin_backward(1.0, reducing=False)
    assert window.state is State.ACCUMULATING and window.gradients is Gradients.LOCAL
    window.add_step(1.0, None, samples=4)
    assert window.at_boundary
    micro_step(window)
    assert window.gradients is Gradients.REDUCED
    window.end()
    assert (window.state, window.steps, window.weight, window.samples) == (State.ENDED, 2, 2.0, 8)
    window.restart()
    assert window.state is State.EMPTY and window.gradients is Gradients.NONE and not window.steps


@pytest.mark.parametrize("after", ["begin_forward", "step", "end"])
def test_a_batch_that_begins_no_window_is_a_mistake_of_ours(after) -> None:
    window = Window(1)
    if after == "begin_forward":
        window.begin_forward()
    else:
        micro_step(window)
    if after == "end":
        window.end()
    with pytest.raises(AssertionError, match=f"from {window.state.name} to HANDED_OUT"):
        window.hand_out()


def test_a_window_ends_once_and_not_before_it_began() -> None:
    window = Window(1)
    with pytest.raises(AssertionError, match="from EMPTY to ENDED"):
        window.end()
    micro_step(window)
    window.end()
    with pytest.raises(AssertionError, match="from ENDED to ENDED"):
        window.end()


def test_what_hooks_of_a_step_do_is_part_of_no_window() -> None:
    window = Window(1)
    micro_step(window)
    window.end()
    window.begin_forward()
    window.begin_backward(1.0, reducing=True)
    assert window.state is State.ENDED


def test_a_rank_without_a_backward_counts_its_step() -> None:
    window = Window(2)
    window.join(reducing=True)
    window.add_step(1.0, None, samples=0)
    assert window.state is State.ACCUMULATING and not window.backwards and window.gradients is Gradients.REDUCED


def test_a_restart_keeps_its_place() -> None:
    window = Window(4)
    micro_step(window)
    window.restart(steps=window.steps)
    assert (window.steps, window.weight, window.backwards) == (1, 0.0, 0) and not window.at_start


def test_the_user_decides_over_counting() -> None:
    window = Window(3)
    window.forced_boundary = True
    assert window.at_boundary
    micro_step(window)
    window.restart()
    assert window.forced_boundary is True, "it holds until the user changes it"
    window.forced_boundary = None
    assert not window.at_boundary


@pytest.mark.parametrize(
    ("accumulation", "shares", "weights", "steps", "weight"),
    [
        (4, [1.0, 1.0], None, 2, 4.0),  # divided by 4 in each backward, by 4 / 4 at the end: a sum
        (4, [1.0, 0.5], None, 2, 3.0),  # a batch of half the size
        (2, [1.0, 1.0], [6.0, 10.0], 2, 16.0),  # what the user gave wins
        (1, [1.0], None, 1, 1.0),
    ],
)
def test_the_divisor_of_a_sum(accumulation, shares, weights, steps, weight) -> None:
    window = Window(accumulation)
    for index, share in enumerate(shares):
        micro_step(window, share, None if weights is None else weights[index])
    assert window.end_as_sum() == 0
    assert (window.steps, window.weight, window.state) == (steps, weight, State.ENDED)


def test_micro_steps_that_no_step_has_counted() -> None:
    """Four forwards, each with two backwards, and one call of ``step``."""
    window = Window(4)
    for _ in range(4):
        window.begin_forward()
        window.begin_backward(1.0, reducing=True)
        window.begin_backward(1.0, reducing=True)
    window.add_step(1.0, None, samples=4)
    assert window.end_as_sum() == 3 and window.steps == 4 and window.backwards == 8
