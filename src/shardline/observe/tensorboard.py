"""TensorBoard: one record a step with all its values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardline.events import Event
from shardline.observe.sink import Run, Sink
from shardline.observe.values import values_of

__all__ = ["TensorBoard"]

_FLUSH_SECONDS = 10


class TensorBoard(Sink):
    """Writes event files to ``folder``. A run that goes on purges the steps that a kill took back."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def open(self, run: Run) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from torch.utils.tensorboard.writer import FileWriter

        self._writer = FileWriter(str(self._folder), flush_secs=_FLUSH_SECONDS)
        if run.step:  # readers drop what they have of this step and later ones
            at = run.step + 1
            self._writer.add_event(Record(step=at, file_version="brain.Event:2"))
            self._writer.add_event(Record(step=at, session_log=SessionLog(status=SessionLog.START)))

    def receive(self, event: Event) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        step, values = values_of(event)
        if values:
            rows = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            self._writer.add_summary(Summary(value=rows), step)

    def save(self) -> Mapping[str, str]:
        self._writer.flush()
        return {}

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
