"""Notices that are emitted once."""

from __future__ import annotations

from shardline.engine.notices import Notices
from shardline.events import Events, Notice


def test_a_notice_comes_once_by_its_text_or_its_key() -> None:
    events, told = Events(), []
    events.subscribe(told.append)
    notices = Notices(events)
    for message, key in (("a", None), ("b", None), ("a", None), ("c", "kind"), ("d", "kind")):
        notices.once(message, key)
    assert told == [Notice("a"), Notice("b"), Notice("c")]
