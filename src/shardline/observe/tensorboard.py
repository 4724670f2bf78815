"""TensorBoard: one record a step with all its values."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from shardline.events import Event
from shardline.observe.sink import Run, Sink
from shardline.observe.values import values_of

__all__ = ["TensorBoard"]


class TensorBoard(Sink):
    """Writes event files to ``folder``. A run that goes on purges the steps that a kill took back.

    An event is in the file when :meth:`receive` returns, so that a kill loses none. TensorBoard's own writer works on a
    thread, and its checksums in Python keep the interpreter from the training in the middle of the next step.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def open(self, run: Run) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        self._writer = RecordWriter(_new_file(self._folder).open("xb", buffering=0))
        self._write(file_version="brain.Event:2")
        if run.step:  # readers drop what they have of this step and later ones
            self._write(step=run.step + 1, session_log=SessionLog(status=SessionLog.START))

    def receive(self, event: Event) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        step, values = values_of(event)
        if values:
            rows = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            self._write(step=step, summary=Summary(value=rows))

    def _write(self, **record: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record

        self._writer.write(Record(wall_time=time.time(), **record).SerializeToString())

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _new_file(folder: Path) -> Path:
    """Behind all others in the order of names, in which TensorBoard reads files, whatever the clock says."""
    others = (each.name.split(".")[3] for each in folder.glob("events.out.tfevents.*.*"))
    newest = max((int(seconds) for seconds in others if seconds.isdecimal()), default=0)
    seconds = max(int(time.time()), newest + 1)
    return folder / f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}.0"
