from __future__ import annotations

import dataclasses

import pytest

from shardline.events import Events, Notice, StepSkipped


def test_sinks_see_events_in_order_of_subscription():
    seen: list[tuple[str, object]] = []
    events = Events()
    events.subscribe(first := lambda event: seen.append(("first", event)))
    events.subscribe(lambda event: seen.append(("second", event)))
    events.subscribe(first)  # twice is once
    notice = Notice("hello")
    events.emit(notice)
    assert seen == [("first", notice), ("second", notice)]


def test_unsubscribed_sink_is_called_no_more():
    seen: list[object] = []
    events = Events()
    events.subscribe(seen.append)
    events.unsubscribe(seen.append)
    events.unsubscribe(seen.append)
    events.emit(Notice("hello"))
    assert seen == []


def test_a_sink_may_unsubscribe_itself_while_it_is_called():
    seen: list[object] = []
    events = Events()

    def once(event: object) -> None:
        seen.append(event)
        events.unsubscribe(once)

    events.subscribe(once)
    events.subscribe(seen.append)
    events.emit(Notice("a"))
    events.emit(Notice("b"))
    assert seen == [Notice("a"), Notice("a"), Notice("b")]


def test_a_failing_sink_is_not_silent():
    events = Events()

    def broken(event: object) -> None:
        raise OSError("disk full")

    events.subscribe(broken)
    with pytest.raises(OSError, match="disk full"):
        events.emit(Notice("hello"))


def test_events_are_values():
    event = StepSkipped(step=3, reason="a gradient is inf", loss_scale_before=4.0, loss_scale_after=2.0)
    assert event == dataclasses.replace(event)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.step = 4  # type: ignore[misc]
