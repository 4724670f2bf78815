"""The run log: every event as a line of JSON, of which ``shardline report`` makes a page."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

from shardline.events import Event, StepDone
from shardline.observe.files import go_on
from shardline.observe.report.record import FILE
from shardline.observe.sink import Run, Sink

__all__ = ["JsonLines"]


class JsonLines(Sink):
    """Appends to ``dir/events.jsonl``. A line holds the class of the event, the time, and the event's attributes.

    Numbers that JSON has no word for are the strings ``"nan"``, ``"inf"`` and ``"-inf"``.
    """

    def __init__(self, dir: str) -> None:
        self._path = Path(dir) / FILE
        self._file: TextIO | None = None

    def open(self, run: Run) -> None:
        self._file = go_on(self._path, run.step, _step_of)

    def receive(self, event: Event) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"event": type(event).__name__, "time": time.time(), **_plain(event)}) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _plain(event: Event) -> dict[str, Any]:
    values = {each.name: _value(getattr(event, each.name)) for each in fields(event) if each.name != "read_memory"}
    return values | {"memory_bytes": event.memory_bytes} if isinstance(event, StepDone) else values


def _value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _value(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_value(inner) for inner in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _step_of(line: str) -> int | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    step = found.get("step")
    return step if isinstance(step, int) and found.get("event") not in ("RunStarted", "CheckpointLoaded") else None
