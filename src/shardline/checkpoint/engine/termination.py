"""A request to end the job: SIGTERM or SIGUSR1 becomes a flag. At their next step all ranks save and exit."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["TerminationSignal"]

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class TerminationSignal:
    """Listens to the signals by which batch systems announce the end, however often they come: they are sent to every
    process of a job, and a launcher that has received one passes it on. A second signal cannot be told from a repeated
    first one, so only SIGKILL ends a process that is stuck.

    Attributes:
        received: the name of the last one that came.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Begin to listen; does nothing outside of the main thread, where no handler can be set."""
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}

    def stop(self) -> None:
        """Put the earlier handlers back."""
        before, self._before = self._before, {}
        for number, handler in before.items():
            if signal.getsignal(number) == self._receive:
                signal.signal(number, handler or signal.SIG_DFL)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
