"""A CSV file for each value, with a line for each step, as DeepSpeed's ``csv_monitor`` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from shardline.events import Event
from shardline.observe.files import go_on
from shardline.observe.sink import Run, Sink
from shardline.observe.values import values_of

__all__ = ["CsvFiles"]


class CsvFiles(Sink):
    """Appends to files such as ``train_loss.csv`` in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, TextIO] = {}
        self._step = 0

    def open(self, run: Run) -> None:
        self._step = run.step

    def receive(self, event: Event) -> None:
        step, values = values_of(event)
        for name, value in values.items():
            if name not in self._files:
                stem = name.replace("/", "_")
                path = self._folder / f"{stem}.csv"
                self._files[name] = go_on(path, self._step, _step_of, head=f"step,{stem}")
            self._files[name].write(f"{step},{value!r}\n")

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()


def _step_of(line: str) -> int | None:
    first = line.partition(",")[0]
    return int(first) if first.isdecimal() else None
