"""A run as its log records it: the steps that count, the other events, and what it ran with. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardline.errors import UsageError

__all__ = ["FILE", "Record", "read"]

FILE = "events.jsonl"

Line = dict[str, Any]


@dataclass
class Record:
    """The lines of a run log by kind, in order.

    Attributes:
        starts: of each process that took part; the last one's configuration and environment are shown.
        steps, phases, scalars: by step.
        memory: bytes over one step of the last process, if it was measured.
    """

    starts: list[Line] = field(default_factory=list)
    steps: dict[int, Line] = field(default_factory=dict)
    phases: dict[int, Line] = field(default_factory=dict)
    scalars: dict[int, dict[str, float]] = field(default_factory=dict)
    skipped: dict[int, Line] = field(default_factory=dict)
    saved: list[Line] = field(default_factory=list)
    loaded: list[Line] = field(default_factory=list)
    notices: list[Line] = field(default_factory=list)
    memory: Line | None = None

    @property
    def start(self) -> Line:
        """How the last process has begun: its configuration, environment and units."""
        return self.starts[-1] if self.starts else {"environment": {}, "config": {}, "origins": {}, "units": []}

    @property
    def config(self) -> Line:
        """The configuration of the last process."""
        return dict(self.start["config"])

    def take_back(self, step: int) -> None:
        """Steps after ``step`` did not happen."""
        for table in (self.steps, self.phases, self.scalars, self.skipped):
            for late in [at for at in table if at > step]:
                del table[late]
        self.saved = [line for line in self.saved if line["step"] <= step]


def read(folder: Path) -> Record:
    """The record of the run whose log is in ``folder``.

    Raises:
        UsageError: there is no log, it cannot be read, or no step in it was applied.
    """
    path = folder / FILE if folder.is_dir() else folder
    if not path.is_file():
        raise UsageError(
            f'{folder} holds no {FILE}. A run writes one where its configuration has "run_log": {{"dir": "{folder}"}}.'
        )
    record, is_log = Record(), False
    try:
        for line in _lines(path):
            is_log = True
            _add(record, line)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {(error.strerror or str(error)).lower()}.") from None
    if not is_log and path.stat().st_size:
        raise UsageError(f"{path} is no run log: it holds no line that a run writes.")
    if record.skipped and not record.steps:
        why = "; ".join(dict.fromkeys(str(line["reason"]) for line in record.skipped.values()))
        raise UsageError(f"{path} holds no step that was applied: all {len(record.skipped):,} were skipped ({why}).")
    if not record.steps:
        raise UsageError(f"{path} holds no step yet.")
    return record


def _lines(path: Path) -> Iterator[Line]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:  # the last line of a process that was killed
                continue
            if isinstance(line, dict) and isinstance(line.get("event"), str):
                yield line


def _add(record: Record, line: Line) -> None:
    match line["event"]:
        case "RunStarted":
            record.starts.append(line)
        case "StepDone":
            record.steps[line["step"]] = line
        case "PhaseTimes":
            record.phases[line["step"]] = line
        case "Scalars":
            values = {name: float(value) for name, value in line["values"].items()}
            record.scalars.setdefault(line["step"], {}).update(values)
        case "StepSkipped":
            record.skipped[line["step"]] = line
        case "CheckpointSaved":
            record.saved.append(line)
        case "CheckpointLoaded":
            record.take_back(line["step"])
            record.loaded.append(line)
        case "Notice":
            record.notices.append(line)
        case "MemoryOverStep":
            record.memory = line
