"""The sinks of one engine: opened when the first step is known, closed at the end of the engine or of the process."""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.util import Finalize
from weakref import WeakMethod, ref

from shardline.config import Config
from shardline.events import (
    CheckpointLoaded,
    Event,
    Events,
    PhaseTimes,
    Scalars,
    StepDone,
    StepSkipped,
)
from shardline.observe.sink import Run, Sink

__all__ = ["Sinks"]

_OF_A_STEP = (StepDone, StepSkipped, PhaseTimes, Scalars)


class Sinks:
    """Passes events to sinks, and marks where a run begins.

    Args:
        sinks: by name; empty on other ranks than 0.
    """

    def __init__(self, sinks: Mapping[str, Sink], config: Config) -> None:
        self._config = config
        self._at_once = {name: sink for name, sink in sinks.items() if not sink.waits}
        self._waiting = {name: sink for name, sink in sinks.items() if sink.waits}
        self._step = 0
        self._states: Mapping[str, Mapping[str, str]] = {}
        self._early: list[Event] = []  # what came before the first step was known
        self._is_open = self.is_closed = False
        self._opened: list[Sink] = []
        self._at_exit: Callable[[], None] | None = None
        self._at_exit_of_multiprocessing: Finalize | None = None

    def attach(self, events: Events, finish: Callable[[], None]) -> None:
        """Listen to ``events``.

        Args:
            finish: a bound method that emits what is known late; it is called where the process ends before the engine.
        """
        for sink in self._at_once.values():
            sink.open(Run(self._config))
        if self._at_once or self._waiting:
            events.subscribe(self.receive)
            self._at_exit = partial(_end, ref(self), WeakMethod(finish))
            self._at_exit_of_multiprocessing = Finalize(None, self._at_exit, exitpriority=20)

    def receive(self, event: Event) -> None:
        """Hand ``event`` on, at once or when the sinks are open."""
        for sink in self._at_once.values():
            sink.receive(event)
        if not self._waiting or self.is_closed:
            return
        if isinstance(event, CheckpointLoaded):
            self._close_waiting()
            self._step, self._states = event.step, event.sinks
        if not self._is_open and isinstance(event, _OF_A_STEP):
            self._open()
        if self._is_open:
            for sink in self._waiting.values():
                sink.receive(event)
        else:
            self._early.append(event)

    def _open(self) -> None:
        self._is_open = True
        for name, sink in self._waiting.items():
            sink.open(Run(self._config, self._step, self._states.get(name, {})))
            self._opened.append(sink)
        if self._at_exit is not None:  # after what trackers have registered, so that it is called before
            atexit.register(self._at_exit)
        early, self._early = self._early, []
        for event in early:
            for sink in self._waiting.values():
                sink.receive(event)

    def _close_waiting(self) -> None:
        self._is_open = False
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)
        with contextlib.ExitStack() as stack:  # all of them, also where one raises
            while self._opened:
                stack.callback(self._opened.pop().close)

    def save(self) -> dict[str, dict[str, str]]:
        """What sinks put into a checkpoint that is saved now, by name."""
        if not self._is_open:
            return {name: dict(state) for name, state in self._states.items()}
        found = {name: dict(sink.save()) for name, sink in self._waiting.items()}
        return {name: state for name, state in found.items() if state}

    def close(self) -> None:
        """Close all. What comes later is not kept."""
        if self._at_exit_of_multiprocessing is not None:
            self._at_exit_of_multiprocessing.cancel()
        if not self.is_closed:
            self.is_closed = True
            for sink in self._at_once.values():
                sink.close()
            self._close_waiting()


def _end(sinks: ref[Sinks], finish: WeakMethod[Callable[[], None]]) -> None:
    """The process ends, perhaps by an error, and the sinks were not closed."""
    found, emit = sinks(), finish()
    if found is not None and not found.is_closed:
        if emit is not None:
            with contextlib.suppress(Exception):  # after an error a device may not answer any more
                emit()
        found.close()
