"""A save that a thread writes. If it fails, the next call raises the error, or the process ends with code 1."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.util import Finalize

from shardline.errors import CheckpointError
from shardline.runtime.ending import has_failed

__all__ = ["BackgroundSave", "finish"]

logger = logging.getLogger("shardline")

_UNREPORTED: dict[int, BackgroundSave] = {}
"""Saves that run, and failed ones whose error was not raised yet; also those of destroyed engines."""


class BackgroundSave:
    """A thread that runs ``write`` and keeps its error until a caller asks for the result.

    The end of the process waits for it.

    Args:
        write: writes and commits the checkpoint.
        over: called at the end, whatever happened.

    Attributes:
        seconds: how long it took; None until it is written.
    """

    def __init__(self, write: Callable[[], None], over: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self.seconds: float | None = None
        begin = time.monotonic()

        def run() -> None:
            try:
                write()
                self.seconds = time.monotonic() - begin
                _UNREPORTED.pop(id(self), None)
            except BaseException as error:
                self._error = error
                logger.error("a checkpoint could not be written in the background: %s", error)
            finally:
                over()

        self._thread = threading.Thread(target=run, name="shardline-checkpoint")
        _UNREPORTED[id(self)] = self
        try:
            self._thread.start()
        except BaseException:
            _UNREPORTED.pop(id(self))
            over()
            raise

    def result(self) -> None:
        """Return when it is written.

        Raises:
            CheckpointError: if it failed.
        """
        self._thread.join()
        _UNREPORTED.pop(id(self), None)
        if self._error is not None:
            said = f"the last checkpoint was not written in the background: {self._error}"
            raise CheckpointError(said) from self._error


def finish() -> None:
    """Wait for every save that still runs, of any engine.

    Raises:
        CheckpointError: for the first one whose error was not raised yet.
    """
    for save in tuple(_UNREPORTED.values()):
        save.result()


def _at_the_end() -> None:
    """Report a failed save that no call has raised: the process must not end with code 0."""
    try:
        finish()
    except CheckpointError as error:
        sys.stderr.write(f"shardline: {error}\nNothing else has said so: this process ends with code 1.\n")
        if not has_failed():  # else it ends with that error's code by itself
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(1)  # nothing that runs at the end of Python can choose the code otherwise


# Not atexit, which processes of multiprocessing skip. It runs last.
_end = Finalize(None, _at_the_end, exitpriority=-1_000_000)
