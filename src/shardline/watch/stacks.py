"""The Python stack of another process, also of one that hangs in C code or holds its interpreter.

The process has registered a signal with faulthandler, whose handler needs neither a Python thread nor the interpreter's
lock. It writes into a file without a name, which processes of the same user on the same host read.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from functools import cache

__all__ = ["listen", "stack_of"]

_SECONDS = 2.0  # for the signal to arrive and the stack to be written
_LINES = 24


def _signal() -> int:
    """A signal that neither torch, nor Python, nor a batch system uses."""
    return int(signal.SIGRTMIN) + 9


@cache
def listen() -> int:
    """Have this process write the stack of its main thread when it is asked. Returns the file descriptor.

    Raises:
        OSError, AttributeError, ValueError: where that is not possible.
    """
    fd = os.memfd_create("stack")
    os.fchmod(fd, 0o600)
    faulthandler.register(_signal(), file=fd, all_threads=False, chain=False)
    return fd


def stack_of(pid: int, fd: int) -> str:
    """The stack of process ``pid``, which listens and writes to its descriptor ``fd``; empty where none came."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/fd/{fd}", "rb") as file:
        begin = file.seek(0, os.SEEK_END)
        process = os.pidfd_open(pid)  # the very process whose file is open, or none
        try:
            if os.path.samestat(os.stat(f"/proc/{pid}/fd/{fd}"), os.fstat(file.fileno())):
                signal.pidfd_send_signal(process, _signal())
        finally:
            os.close(process)
        size, deadline = begin, time.monotonic() + _SECONDS
        while time.monotonic() < deadline:  # until it is there and has stopped growing
            before, size = size, file.seek(0, os.SEEK_END)
            if size > begin and size == before:
                break
            time.sleep(0.02)
        file.seek(begin)
        lines = file.read().decode(errors="replace").rstrip().splitlines()
        return "\n".join(lines[:_LINES] + ["  ..."] * (len(lines) > _LINES))
    return ""
