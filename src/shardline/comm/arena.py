"""Memory of one rank that the others of its host can read: a large sparse file without a name, which all of them map.

Pages of the file come with a buffer and go with it, so one mapping made at the start does for good. The file has no
name, so nothing is left of it when the last process that maps it is gone, however it went.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Arena", "Peer", "in_pages"]


def in_pages(size: int) -> int:
    """``size`` bytes, rounded up to whole pages and at least one."""
    return max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE


class Arena:
    """The buffers of this rank that others may read, behind ``header`` bytes of words (int64) that others may read too.

    Attributes:
        words: the header. The first word is the token by which the others know that they found this arena.
        is_quiet: whether nobody reads any buffer; set by who knows.

    Raises:
        OSError, ValueError: where there is no such memory.
    """

    def __init__(self, size: int, header: int) -> None:
        self.size, self.token, self._pid = size, secrets.randbits(62), os.getpid()
        self.fd = os.memfd_create("shardline")
        self.close = weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, size)
        os.posix_fallocate(self.fd, 0, in_pages(header))
        self._map = mmap.mmap(self.fd, size)
        self._map.madvise(mmap.MADV_DONTDUMP)  # a core dump would touch, and so make, every page
        self._base = torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()
        self._holes = [(in_pages(header), size)]
        self._left: deque[tuple[int, int]] = deque()  # by buffers that are gone, still with their pages
        self._free: deque[tuple[int, int]] = deque()  # and without, to be holes
        self.is_quiet: Callable[[], bool] = lambda: True
        self.words = memoryview(self._map)[:header].cast("q")
        self.words[0] = self.token

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat buffer with arbitrary contents, whose memory is there: to touch it later cannot fail.

        Raises:
            OSError: where there is no such memory.
        """
        self._merge_holes()
        size = in_pages(numel * dtype.itemsize)
        hole = next((hole for hole in self._holes if hole[1] - hole[0] >= size), None)
        if hole is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        start, stop = hole
        os.posix_fallocate(self.fd, start, size)
        self._holes[self._holes.index(hole)] = (start + size, stop)
        piece = memoryview(self._map)[start : start + size]
        weakref.finalize(piece, self._leave, start, start + size).atexit = False
        with torch.inference_mode(False):
            return torch.frombuffer(piece, dtype=dtype, count=numel)

    def place(self, buffer: Tensor) -> int | None:
        """Where in the file ``buffer`` begins, if it lies here."""
        offset = buffer.data_ptr() - self._base
        return offset if 0 <= offset < self.size else None

    def _leave(self, start: int, stop: int) -> None:
        """A buffer is gone. This can come at any moment, on any thread."""
        self._left.append((start, stop))
        self._give_back()

    def _give_back(self) -> None:
        """Let the pages of buffers that are gone go, unless somebody may be reading them."""
        # What a forked child (a worker of a data loader) lets go of is not its own.
        if os.getpid() != self._pid or sys.is_finalizing() or not self.is_quiet():
            return
        with contextlib.suppress(IndexError):
            while True:
                start, stop = self._left.popleft()
                self._map.madvise(mmap.MADV_REMOVE, start, stop - start)
                self._free.append((start, stop))

    def _merge_holes(self) -> None:
        self._give_back()
        if not self._free:
            return
        found = sorted([*self._holes, *(self._free.popleft() for _ in range(len(self._free)))])
        self._holes = []
        for start, stop in found:
            if self._holes and self._holes[-1][1] == start:
                self._holes[-1] = (self._holes[-1][0], stop)
            else:
                self._holes.append((start, stop))


class Peer:
    """Another rank's arena, to read.

    Raises:
        OSError, ValueError: if it cannot be mapped, or is not the one that was meant.
    """

    def __init__(self, rank: int, pid: int, fd: int, size: int, header: int, token: int) -> None:
        self.rank, self.pid = rank, pid
        self._path = f"/proc/{pid}/fd/{fd}"
        opened = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._identity = os.fstat(opened)
            self._map = mmap.mmap(opened, size, prot=mmap.PROT_READ)
            self._map.madvise(mmap.MADV_DONTDUMP)
        finally:
            os.close(opened)
        self.words = memoryview(self._map)[:header].cast("q")
        if self.words[0] != token:
            raise ValueError(f"{self._path} is not the memory of rank {rank}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says once that this cannot be written, which is the point
            self.read(0, 1, torch.int64)

    def read(self, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
        """What lies in the file ``offset`` bytes behind its beginning (1-D)."""
        return torch.frombuffer(self._map, dtype=dtype, count=numel, offset=offset) if numel else torch.empty(0)

    def is_there(self) -> bool:
        """Whether its process lives and has the arena open: no other file can be this one while it is mapped."""
        try:
            return os.path.samestat(os.stat(self._path), self._identity)
        except OSError:
            return False
