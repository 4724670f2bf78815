"""A thread's wait for the end of other processes of this host."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Mapping

__all__ = ["Exits"]


class Exits:
    """The processes of some ranks, whose ends are waited for without looking again and again (Linux).

    Args:
        pids: of processes, by rank. One whose end cannot be waited for is left out.
    """

    def __init__(self, pids: Mapping[int, int]) -> None:
        self._poll = select.poll()
        self._woken, self._waker = os.pipe()
        self._poll.register(self._woken, select.POLLIN)
        self._ranks: dict[int, int] = {}  # by file descriptor
        for rank, pid in pids.items():
            with contextlib.suppress(OSError, AttributeError):
                fd = os.pidfd_open(pid)
                self._ranks[fd] = rank
                self._poll.register(fd, select.POLLIN)

    def wait(self, seconds: float) -> list[int]:
        """The ranks whose processes have ended since the last call; after ``seconds``, or when woken, maybe none."""
        found = [fd for fd, _ in self._poll.poll(1000 * seconds) if fd in self._ranks]
        for fd in found:
            self._poll.unregister(fd)
            os.close(fd)
        return [self._ranks.pop(fd) for fd in found]

    def wake(self) -> None:
        """End the wait of another thread, or the next one."""
        os.write(self._waker, b".")

    def close(self) -> None:
        for fd in (self._woken, self._waker, *self._ranks):
            os.close(fd)
