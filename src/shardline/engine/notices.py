"""Notices of one engine, each of which is emitted once."""

from __future__ import annotations

from shardline.events import Events, Notice

__all__ = ["Notices"]


class Notices:
    """Emits a notice the first time, and nothing when it comes again."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._emitted: set[str] = set()

    def once(self, message: str, key: str | None = None) -> None:
        """Emit ``message``, unless it or another one of the same ``key`` was emitted before."""
        if (key or message) not in self._emitted:
            self._emitted.add(key or message)
            self._events.emit(Notice(message))
