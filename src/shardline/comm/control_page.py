"""How ranks of one host read each other's memory: a shared control page of int64 counters, and ``process_vm_readv``.

The page of a rank is a small file without a name, so nothing is left of it when the last process that maps it has
ended, in whatever way. Everything else is read where it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import secrets
import weakref
from typing import NoReturn

import torch
from torch import Tensor

from shardline.errors import LostRankError

__all__ = ["ControlPage", "Peer"]

_libc = ctypes.CDLL(None, use_errno=True)
if hasattr(_libc, "process_vm_readv"):
    _libc.process_vm_readv.restype = ctypes.c_ssize_t

_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)

_TEXT = 4096
"""Bytes at the end of a page for the error of its rank: their length, and the text."""


class _Range(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


class ControlPage:
    """Counters (int64) that this rank writes and its peers read, and a text.

    Attributes:
        counters: the first one is a token by which peers check that they opened this page.
        probe: a copy of the token in ordinary memory: a peer that can read it there can read everything.

    Raises:
        OSError, ValueError, AttributeError: where there is no such memory.
    """

    def __init__(self, size: int) -> None:
        self.size = size = size + _TEXT
        self.fd = os.memfd_create("shardline")
        self.close = weakref.finalize(self, os.close, self.fd)
        self.close.atexit = False  # a process that exits waits for its peers, and counts as alive until then
        os.posix_fallocate(self.fd, 0, size)  # memory that is missing later would be SIGBUS
        self.counters = memoryview(mmap.mmap(self.fd, size)).cast("q")
        self.counters[0] = token = secrets.randbits(62)
        self.probe = torch.tensor([token], device="cpu")
        # Where Yama forbids the processes of one user to read each other, the one that is read can allow it.
        _libc.prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)

    def post(self, text: str) -> None:
        """Show ``text`` to the peers instead of the previous one; of a long text its end."""
        area = self.counters[-_TEXT // 8 :]
        data = text.encode()[8 - _TEXT :]
        area[0] = 0
        area.cast("B")[8 : 8 + len(data)] = data
        area[0] = len(data)


class Peer:
    """Another rank: its control page and its memory, to read.

    Args:
        rank: the peer's.
        pid, fd, size, token, probe: of its process and its page; ``probe`` is an address.

    Raises:
        OSError, ValueError, LostRankError: its memory cannot be read, or is that of another process.
    """

    def __init__(self, rank: int, pid: int, fd: int, size: int, token: int, probe: int) -> None:
        self.rank, self.pid = rank, pid
        self._path = f"/proc/{pid}/fd/{fd}"
        opened = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._identity = os.fstat(opened)
            self.counters = memoryview(mmap.mmap(opened, size, prot=mmap.PROT_READ)).cast("q")
        finally:
            os.close(opened)
        found = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.read(probe, found)
        if not self.counters[0] == found.item() == token:
            raise ValueError(f"{self._path} is not the control page of rank {rank}")

    def read(self, address: int, out: Tensor) -> None:
        """Fill ``out`` (1-D) with the bytes at ``address`` of the peer's memory.

        Raises:
            LostRankError: the peer ended.
            OSError: reading is not allowed, or the address is not mapped.
        """
        here, there = _Range(out.data_ptr(), out.nbytes), _Range(address, out.nbytes)
        while here.size:
            done = _libc.process_vm_readv(self.pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
            if done <= 0:
                self._raise(address)
            here.base, here.size = here.base + done, here.size - done  # one call moves at most 2 GB
            there.base, there.size = there.base + done, here.size

    def _raise(self, address: int) -> NoReturn:
        error = ctypes.get_errno()
        if error == errno.ESRCH or not self.is_alive():  # a process that dies keeps its files longer than its memory
            raise LostRankError(
                f"rank {self.rank} (process {self.pid}) ended, or closed its engine, before what it sent was read. "
                f"What that rank printed last says why."
            )
        raise OSError(error, f"{os.strerror(error)}: memory of rank {self.rank} (process {self.pid}) at {address:#x}")

    def posted(self) -> str:
        """The text that the peer shows."""
        area = self.counters[-_TEXT // 8 :]
        return area.cast("B")[8 : 8 + area[0]].tobytes().decode(errors="replace")

    def is_alive(self) -> bool:
        """Whether its process runs and has the page open: no other file has its identity while it is mapped."""
        with contextlib.suppress(OSError):
            return os.path.samestat(os.stat(self._path), self._identity)
        return False
