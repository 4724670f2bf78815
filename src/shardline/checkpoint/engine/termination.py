"""A request to end the job: SIGTERM becomes a flag. At their next step the ranks agree on it, save and exit."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["TerminationSignal"]


class TerminationSignal:
    """Listens to SIGTERM, however often it comes: a batch system sends it to every process of a job, and so does a
    launcher that has received it. A second signal cannot be told from a repeated first one, so only SIGKILL ends a
    process that is stuck.

    Attributes:
        received: whether one came.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None
        self._installed = False

    def listen(self) -> None:
        """Begin to listen; does nothing outside of the main thread, where no handler can be set."""
        if threading.current_thread() is threading.main_thread() and not self._installed:
            self._before = signal.signal(signal.SIGTERM, self._receive)
            self._installed = True

    def stop(self) -> None:
        """Put the earlier handler back."""
        if self._installed:
            self._installed = False
            if signal.getsignal(signal.SIGTERM) == self._receive:
                signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
