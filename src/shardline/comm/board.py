"""What ranks of one host need to read each other's memory: a board of words that all see, and the reading itself.

A board is a small file without a name, so nothing is left of it when the last process that maps it is gone, however it
went. All else is read where it lies, by ``process_vm_readv``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import secrets
import weakref

import torch
from torch import Tensor

from shardline.errors import LostRankError

__all__ = ["Board", "Peer"]

_libc = ctypes.CDLL(None, use_errno=True)
if hasattr(_libc, "process_vm_readv"):
    _libc.process_vm_readv.restype = ctypes.c_ssize_t

_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)


_SAID = 4096
"""Bytes at the end of a board for what its rank has to say: their length, and text."""


class _Range(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


class Board:
    """Words (int64) that this rank writes and the others see, and a text.

    Attributes:
        words: the first one is a token by which the others know that they found this board.
        probe: a copy of the token in ordinary memory: who reads it there can read everything.

    Raises:
        OSError, ValueError, AttributeError: where there is no such memory.
    """

    def __init__(self, size: int) -> None:
        self.size = size = size + _SAID
        self.fd = os.memfd_create("shardline")
        self.close = weakref.finalize(self, os.close, self.fd)
        self.close.atexit = False  # a process that ends waits for its peers, and is there until it is gone
        os.posix_fallocate(self.fd, 0, size)  # a page that is missing later would be SIGBUS
        self.words = memoryview(mmap.mmap(self.fd, size)).cast("q")
        self.words[0] = token = secrets.randbits(62)
        self.probe = torch.tensor([token], device="cpu")
        # Where Yama keeps processes of one user from reading each other, it asks the one that is read.
        _libc.prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)

    def say(self, text: str) -> None:
        """Show ``text`` to the peers instead of what was said before; of a long one its end."""
        said = self.words[-_SAID // 8 :]
        data = text.encode()[8 - _SAID :]
        said[0] = 0
        said.cast("B")[8 : 8 + len(data)] = data
        said[0] = len(data)


class Peer:
    """Another rank: its board and its memory, to read.

    Args:
        rank: the peer's.
        pid, fd, size, token, probe: of its process and its board; ``probe`` is an address.

    Raises:
        OSError, ValueError, LostRankError: if its memory cannot be read, or is not that which was meant.
    """

    def __init__(self, rank: int, pid: int, fd: int, size: int, token: int, probe: int) -> None:
        self.rank, self.pid = rank, pid
        self._path = f"/proc/{pid}/fd/{fd}"
        opened = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._identity = os.fstat(opened)
            self.words = memoryview(mmap.mmap(opened, size, prot=mmap.PROT_READ)).cast("q")
        finally:
            os.close(opened)
        found = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.read(probe, found)
        if not self.words[0] == found.item() == token:
            raise ValueError(f"{self._path} is not the board of rank {rank}")

    def read(self, address: int, out: Tensor) -> None:
        """Fill ``out`` (1-D) with what lies at ``address`` of the peer's memory.

        Raises:
            LostRankError: if the peer ended.
            OSError: if reading it is not allowed, or nothing lies there.
        """
        here, there = _Range(out.data_ptr(), out.nbytes), _Range(address, out.nbytes)
        while here.size:
            done = _libc.process_vm_readv(self.pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
            if done <= 0:
                self._refused(address)
            here.base, here.size = here.base + done, here.size - done  # one call moves at most 2 GB
            there.base, there.size = there.base + done, here.size

    def _refused(self, address: int) -> None:
        error = ctypes.get_errno()
        if error == errno.ESRCH or not self.is_there():  # a process that dies has its files for longer than its memory
            raise LostRankError(
                f"rank {self.rank} (process {self.pid}) ended, or closed its engine, before what it sent was read. "
                f"What that rank printed last says why."
            )
        raise OSError(error, f"{os.strerror(error)}: memory of rank {self.rank} (process {self.pid}) at {address:#x}")

    def said(self) -> str:
        """What the peer has to say."""
        said = self.words[-_SAID // 8 :]
        return said.cast("B")[8 : 8 + said[0]].tobytes().decode(errors="replace")

    def is_there(self) -> bool:
        """Whether its process lives and has the board open: no other file can be this one while it is mapped."""
        with contextlib.suppress(OSError):
            return os.path.samestat(os.stat(self._path), self._identity)
        return False
