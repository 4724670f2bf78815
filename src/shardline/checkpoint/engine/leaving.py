"""A request to end: SIGTERM becomes a flag, which the ranks agree on at their next step, save, and exit."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["Leaving"]


class Leaving:
    """Listens to SIGTERM, however often it comes: a batch system asks every process of a job, and so does a launcher
    that it asked. Nobody can tell a second request from the same one that came while a long call kept Python from
    looking, so a stuck process is ended by SIGKILL.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None
        self._installed = False

    def listen(self) -> None:
        """Begin to listen; does nothing outside of the main thread, where no handler can be set."""
        if threading.current_thread() is threading.main_thread() and not self._installed:
            self._before = signal.signal(signal.SIGTERM, self._receive)
            self._installed = True

    def stop(self) -> None:
        """Put back what was there before."""
        if self._installed:
            self._installed = False
            if signal.getsignal(signal.SIGTERM) == self._receive:
                signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
