"""A request to end: SIGTERM becomes a flag, which the ranks agree on at their next step, save, and exit."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

__all__ = ["Leaving"]


_ONE_REQUEST = 5.0  # seconds: a batch system asks every process of a job, and a launcher that it asked asks again


class Leaving:
    """Listens to SIGTERM. A later one is the program's own affair again, so that a stuck process can be ended."""

    def __init__(self) -> None:
        self.asked = False
        self._when = 0.0
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
        if not self.asked:
            self.asked, self._when = True, time.monotonic()
        elif time.monotonic() - self._when > _ONE_REQUEST:
            self.stop()
            signal.raise_signal(number)
