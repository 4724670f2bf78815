"""The lock of a directory of checkpoints: which job may write there. No torch."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import threading
import weakref
from pathlib import Path

from shardline.checkpoint.format.files import kind_of
from shardline.errors import CheckpointError, shown

__all__ = ["LOCK", "Lock"]

LOCK = ".shardline.lock"

_OWNER = "process "
_LINE = 300  # bytes of a line of the lock file, which is written in place


class Lock:
    """The right to write to a directory. The system takes it back when the process ends, however it ends."""

    _held: weakref.WeakValueDictionary[str, Lock] = weakref.WeakValueDictionary()

    def __init__(self, path: Path) -> None:
        self.busy = threading.Lock()  # one save at a time, also of several engines in one process
        self._file = -1
        self._file = _open_lock(path / LOCK)
        try:
            # Not flock: that one lives on in forked loader workers when their parent was killed.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = self._line(0) or "another process"
            self._close()
            raise CheckpointError(
                f"another job writes checkpoints to {shown(path)} ({shown(owner)}). Two jobs would overwrite each "
                f"other's: end the other one, or save to a directory of this job's own."
            ) from None
        if self._line(0) and not self._line(0).startswith(_OWNER):
            self._close()
            raise CheckpointError(
                f"{shown(path / LOCK)} holds something else than a save writes there. Move it away, or save to another "
                f"directory."
            )
        self._write(0, f"{_OWNER}{os.getpid()} on {socket.gethostname()}")

    @classmethod
    def of(cls, path: Path) -> Lock:
        """The lock of ``path``, shared by everything in this process that keeps a reference to it."""
        name = os.path.realpath(path)
        lock = cls._held.get(name)
        if lock is None:
            lock = cls._held[name] = cls(path)
        return lock

    def note(self, tag: str) -> None:
        """Write down what ``latest`` is about to name."""
        self._write(1, tag)

    def noted(self) -> str:
        """What was written down last."""
        return self._line(1)

    def _line(self, number: int) -> str:
        return os.pread(self._file, _LINE, number * _LINE).decode(errors="replace").strip(" \n\0")

    def _write(self, number: int, text: str) -> None:
        os.pwrite(self._file, text.encode()[: _LINE - 1].ljust(_LINE - 1) + b"\n", number * _LINE)

    def _close(self) -> None:
        file, self._file = self._file, -1  # once: another file may have its number afterwards
        if file >= 0:
            os.close(file)

    def __del__(self) -> None:
        self._close()


def _open_lock(file: Path) -> int:
    """Made if it is not there, never truncated, and through no link."""
    mode = file.lstat().st_mode if os.path.lexists(file) else stat.S_IFREG
    kind = kind_of(mode)
    if kind is None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        descriptor = os.open(file, flags, 0o666)
        kind = kind_of(os.fstat(descriptor).st_mode)
        if kind is None:
            return descriptor
        os.close(descriptor)
    raise CheckpointError(
        f"{shown(file)} is {kind}, not a regular file; a process that saves here locks a file of this name. Move it "
        f"away, or save to another directory."
    )
