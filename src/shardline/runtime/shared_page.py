"""A page of int64 numbers that one process writes and processes of its host and user read, and a text at its end.

It is a small file without a name (``memfd_create``), so nothing is left of it when the last process that maps it has
ended, in whatever way. Nobody can shrink it under a reader, for whom that would be SIGBUS.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import weakref

__all__ = ["PeerPage", "SharedPage"]

_TEXT = 4096
"""Bytes at the end of a page: the length of its text, and the text."""


class SharedPage:
    """Numbers that this process writes and its peers read, and a text.

    Attributes:
        counters: the first one is a token by which peers check that they opened this page.

    Raises:
        OSError, AttributeError: where there is no such memory.
    """

    def __init__(self, size: int) -> None:
        self.size = size = size + _TEXT
        self.fd = os.memfd_create("shardline", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.close = weakref.finalize(self, os.close, self.fd)
        self.close.atexit = False  # a process that exits waits for its peers, and counts as alive until then
        os.fchmod(self.fd, 0o600)
        os.posix_fallocate(self.fd, 0, size)  # memory that is missing later would be SIGBUS
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.counters = memoryview(mmap.mmap(self.fd, size)).cast("q")
        self.counters[0] = secrets.randbits(62)

    @property
    def shows(self) -> bool:
        """Whether it shows a text."""
        return self.counters[-_TEXT // 8] != 0

    def post(self, text: str) -> None:
        """Show ``text`` to the peers instead of the previous one; of a long text its end."""
        area = self.counters[-_TEXT // 8 :]
        data = text.encode(errors="backslashreplace")[8 - _TEXT :]
        area[0] = 0
        area.cast("B")[8 : 8 + len(data)] = data
        area[0] = len(data)


class PeerPage:
    """The page of another process, to read; also after that process ended.

    Raises:
        OSError, ValueError: it cannot be opened, or is another page.
    """

    def __init__(self, pid: int, fd: int, size: int, token: int) -> None:
        self.pid = pid
        self._path = f"/proc/{pid}/fd/{fd}"
        opened = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._identity = os.fstat(opened)
            self.counters = memoryview(mmap.mmap(opened, size, prot=mmap.PROT_READ)).cast("q")
        finally:
            os.close(opened)
        if self.counters[0] != token:
            raise ValueError(f"{self._path} is not the page that was announced")

    def posted(self) -> str:
        """The text that the peer shows."""
        area = self.counters[-_TEXT // 8 :]
        return area.cast("B")[8 : 8 + area[0]].tobytes().decode(errors="replace")

    def is_alive(self) -> bool:
        """Whether its process runs and has the page open: no other file has its identity while it is mapped."""
        with contextlib.suppress(OSError):
            return os.path.samestat(os.stat(self._path), self._identity)
        return False
