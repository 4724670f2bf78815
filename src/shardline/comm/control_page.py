"""How ranks of one host read each other's memory: a shared control page of int64 counters, and ``process_vm_readv``.

Everything but the counters is read where it is.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import NoReturn

import torch
from torch import Tensor

from shardline.errors import LostRankError
from shardline.runtime.shared_page import PeerPage, SharedPage

__all__ = ["ControlPage", "Peer"]

_libc = ctypes.CDLL(None, use_errno=True)
if hasattr(_libc, "process_vm_readv"):
    _libc.process_vm_readv.restype = ctypes.c_ssize_t

_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)


class _Range(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


class ControlPage(SharedPage):
    """The counters of a rank.

    Attributes:
        probe: a copy of the token in ordinary memory: a peer that can read it there can read everything.

    Raises:
        OSError, ValueError, AttributeError: where there is no such memory.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.probe = torch.tensor([self.counters[0]], device="cpu")
        # Where Yama forbids the processes of one user to read each other, the one that is read can allow it.
        _libc.prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)


class Peer(PeerPage):
    """Another rank: its control page and its memory, to read.

    Args:
        rank: the peer's.
        pid, fd, size, token, probe: of its process and its page; ``probe`` is an address.

    Raises:
        OSError, ValueError, LostRankError: its memory cannot be read, or is that of another process.
    """

    def __init__(self, rank: int, pid: int, fd: int, size: int, token: int, probe: int) -> None:
        super().__init__(pid, fd, size, token)
        self.rank = rank
        found = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.read(probe, found)
        if found.item() != token:
            raise ValueError(f"the memory of process {pid} is not that of rank {rank}")

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
