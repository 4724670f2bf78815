"""CPU ranks of one host exchange through memory that all of them map: nothing is copied but to where it is used.

Every rank has an :class:`Arena`, a large sparse file without a name in which its buffers lie, and maps those of its
peers to read. To start a transition is to announce where this rank's part lies. To carry it out is to take what this
rank needs straight from where the others announced theirs, and to say that it was read.

No thread does that: whatever is due is done whenever this rank starts or waits for anything, so a rank that waits for
one transition never keeps the others from theirs. What was announced is kept, and not written, until all have read it.

The order "first the data, then the word that announces it" holds on x86-64 as the program has it; elsewhere it would
take fences that Python has not. Anything that is not as needed here is found out by trying, and then gloo does it all.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import platform
import secrets
import sys
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardline.comm.transport import Scratch, Work, add_in_order, put
from shardline.errors import DisagreementError, LostRankError

__all__ = ["SharedMemory", "SharedTransport", "attach"]

_CHANNELS = 2
_RING = 1024
"""Announcements of a channel that can be unread; the next one waits."""

_LINE = 8  # words of a cache line: what one rank writes and another reads at once lie apart
_CHANNEL = 2 * _LINE + 2 * _RING  # words: started | carried out | ring of (offset, bytes)
_HEADER = 8 * (_LINE + _CHANNELS * _CHANNEL) // mmap.PAGESIZE * mmap.PAGESIZE + mmap.PAGESIZE

_SMALL = 1 << 16
"""Bytes below which a buffer stays in private memory, and is copied into the arena when it is announced."""

_YIELDS = 50  # rounds of waiting that only let another process run, before the first sleep
_NAP, _LONGEST_NAP = 20e-6, 1e-3  # seconds
_LOOK = 0.1  # seconds of waiting between looks whether the peers still live


class Arena:
    """The buffers of this rank that others may read. Pages of the file come with a buffer and go with it."""

    def __init__(self, size: int) -> None:
        self.size, self.token, self._pid = size, secrets.randbits(62), os.getpid()
        self.fd = os.memfd_create("shardline")
        self.close = weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, size)
        os.posix_fallocate(self.fd, 0, _HEADER)
        self._map = mmap.mmap(self.fd, size)
        self._base = torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()
        self._holes = [(_HEADER, size)]
        self._left: deque[tuple[int, int]] = deque()  # by buffers that are gone, still with their pages
        self._free: deque[tuple[int, int]] = deque()  # and without, to be holes
        self.is_quiet: Callable[[], bool] = lambda: True  # whether nobody reads anything here
        self.words = memoryview(self._map)[:_HEADER].cast("q")
        self.words[0] = self.token

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat buffer with arbitrary contents, whose memory is there: to touch it later cannot fail.

        Raises:
            OSError: where there is no such memory.
        """
        self._merge_holes()
        size = _pages(numel * dtype.itemsize)
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

    def __init__(self, rank: int, pid: int, fd: int, size: int, token: int) -> None:
        self.rank, self.pid = rank, pid
        self._path = f"/proc/{pid}/fd/{fd}"
        opened = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._identity = os.fstat(opened)
            mapped = mmap.mmap(opened, size, prot=mmap.PROT_READ)
        finally:
            os.close(opened)
        self.words = memoryview(mapped)[:_HEADER].cast("q")
        if self.words[0] != token:
            raise ValueError(f"{self._path} is not the memory of rank {rank}")
        with torch.inference_mode(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it cannot be written is the point
            self._bytes = torch.frombuffer(mapped, dtype=torch.uint8)

    def read(self, offset: int, size: int) -> Tensor:
        return self._bytes[offset : offset + size]

    def is_there(self) -> bool:
        """Whether its process lives and has the arena open: no other file can be this one while it is mapped."""
        try:
            return os.path.samestat(os.stat(self._path), self._identity)
        except OSError:
            return False


@dataclass(frozen=True)
class _Announced:
    """A transition that this rank started: what the others read for it, and what there is to do."""

    number: int
    part: Tensor
    is_copy: bool
    carry_out: Callable[[], None]


class SharedMemory:
    """This rank's arena and its peers', and the waiting that all transports over them have in common."""

    def __init__(self, rank: int, arena: Arena, peers: Sequence[Peer], timeout: timedelta) -> None:
        self.rank, self.arena, self.peers, self.timeout = rank, arena, list(peers), timeout.total_seconds()
        self._copies: list[Tensor] = []  # bytes in the arena for what lies elsewhere, not in use now
        self.transports = [SharedTransport(self, channel) for channel in range(_CHANNELS)]
        words = [(peer.words, count) for peer in peers for count in (each.count for each in self.transports)]
        arena.is_quiet = lambda: all(theirs[count + _LINE] >= arena.words[count] for theirs, count in words)

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat buffer that travels without a copy, where it is worth that and there is room."""
        if numel * dtype.itemsize >= _SMALL:
            with contextlib.suppress(OSError):
                return self.arena.empty(numel, dtype)
        return torch.empty(numel, dtype=dtype)

    def settle(self, patience: float | None = None) -> None:
        """Wait (``patience``: at most so many seconds) until nobody reads what this rank announced.

        That goes for transitions that this rank has carried out. The others have started those, so they will too.
        """
        for transport in self.transports:
            self.wait(transport.is_read, patience)
        self.progress()

    def progress(self) -> None:
        """Carry out what all ranks have started, and let go of what all have read."""
        for transport in self.transports:
            transport.progress()

    def wait(self, over: Callable[[], bool], patience: float | None = None) -> None:
        """Do what is due until ``over()``, or for ``patience`` seconds.

        Raises:
            LostRankError: if a peer is gone, or does not come in time.
        """
        turn, nap, begin = 0, _NAP, time.monotonic()
        look = begin + _LOOK
        while True:
            self.progress()
            if over():
                return
            turn += 1
            if turn <= _YIELDS:
                os.sched_yield()
                continue
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP)
            now = time.monotonic()
            if patience is not None and now - begin > patience:
                return
            if now > look:
                look = now + _LOOK
                self._look(over, now - begin)

    def finish_started(self, over: Callable[[], bool], patience: float | None = None) -> None:
        """Do what is due until nothing is left to do, or ``over()``: then one may wait in other ways."""
        self.wait(lambda: over() or not any(each.started for each in self.transports), patience)

    def _look(self, over: Callable[[], bool], waited: float) -> None:
        """See whether waiting has a sense."""
        gone = [peer for peer in self.peers if not peer.is_there()]
        self.progress()
        if gone and not over():  # not even by what it did before it went
            raise LostRankError(
                f"rank {gone[0].rank} (process {gone[0].pid}) ended, or closed its engine, while rank {self.rank} "
                f"waits for it. What that rank printed last says why."
            )
        if waited > self.timeout:
            late = [str(peer.rank) for peer in self.peers if any(each.lacks(peer) for each in self.transports)]
            raise LostRankError(
                f"rank {self.rank} waited {self.timeout:g} s for rank {', '.join(late)}, which runs but does not come. "
                f"Every rank must take the same steps; what keeps one longer needs a longer timeout."
            )

    def to_announce(self, part: Tensor) -> Tensor:
        """``part`` (1-D), or a copy of its bytes in the arena."""
        size = part.numel() * part.element_size()
        if not size or self.arena.place(part) is not None:
            return part
        free = [copy for copy in self._copies if copy.numel() >= size]
        try:
            copy = min(free, key=Tensor.numel) if free else self.arena.empty(_pages(size), torch.uint8)
        except OSError as error:
            raise MemoryError(
                f"rank {self.rank} has no shared memory left for {size} bytes to send ({error}). Leave more memory "
                f'free on this host, or set "communication_transport" to "gloo".'
            ) from error
        self._copies = [other for other in self._copies if other is not copy]
        copy[:size].copy_(part.view(torch.uint8))
        return copy

    def take_back(self, announced: _Announced) -> None:
        """All have read it. A small copy is kept for the next one."""
        if announced.is_copy and announced.part.numel() <= 16 * _SMALL:
            self._copies.append(announced.part)

    def close(self) -> None:
        """Leave: the others find this rank gone. Memory goes when nobody holds a buffer in it any more."""
        with contextlib.suppress(LostRankError, DisagreementError):
            self.finish_started(lambda: False, patience=_LOOK)
        self.arena.close()
        self.transports, self.peers, self._copies = [], [], []


class SharedTransport:
    """One channel of a :class:`SharedMemory`: its transitions are started, and carried out, in one order."""

    def __init__(self, memory: SharedMemory, channel: int) -> None:
        self.memory, self._mine = memory, memory.arena.words
        self.started: deque[_Announced] = deque()  # and not carried out: others may wait for that
        self._kept: deque[_Announced] = deque()  # perhaps not read by all
        # Where in the header: how many were started, how many carried out, and where the parts are.
        self.count = _LINE + channel * _CHANNEL
        self._done, self._ring = self.count + _LINE, self.count + 2 * _LINE

    def gather(self, own: Tensor, buffer: Tensor, boundaries: Sequence[int]) -> Work:
        in_place = own.data_ptr() == buffer[boundaries[self.memory.rank] :].data_ptr()

        def take() -> None:
            put(own, buffer, boundaries, self.memory.rank)
            for peer in self.memory.peers:
                part = buffer[boundaries[peer.rank] : boundaries[peer.rank + 1]]
                part.copy_(self._read(peer, part.numel(), part.dtype))

        return self._start(own, take, hold=(own, buffer), keep=in_place)

    def reduce(self, buffer: Tensor, boundaries: Sequence[int], out: Tensor, *, add: bool, scratch: Scratch) -> Work:
        rank, whole = self.memory.rank, buffer[: boundaries[-1]]
        mine = slice(boundaries[rank], boundaries[rank + 1])

        def add_up() -> None:
            parts = [self._read(peer, whole.numel(), whole.dtype)[mine] for peer in self.memory.peers]
            parts.insert(rank, whole[mine])
            add_in_order(parts, out, add=add)

        return self._start(whole, add_up, hold=(buffer, out), keep=False)

    def _start(self, part: Tensor, carry_out: Callable[[], None], hold: object, *, keep: bool) -> Work:
        """Announce ``part``. With ``keep`` a wait is also one for all that read it: its owner may write it then."""
        memory, mine = self.memory, self._mine
        number = mine[self.count] + 1
        if number - self._read_by_all() > _RING:
            memory.wait(lambda: number - self._read_by_all() <= _RING)
        shown = memory.to_announce(part)
        announced = _Announced(number, shown, shown is not part, carry_out)
        entry = self._ring + 2 * (number % _RING)
        mine[entry], mine[entry + 1] = memory.arena.place(shown) or 0, part.numel() * part.element_size()
        mine[self.count] = number
        self.started.append(announced)
        self._kept.append(announced)
        memory.progress()
        to_the_end = keep and not announced.is_copy

        def over() -> bool:
            return mine[self._done] >= number and (not to_the_end or self._read_by_all() >= number)

        return Work((), lambda: memory.wait(over), hold=hold)

    def _read(self, peer: Peer, numel: int, dtype: torch.dtype) -> Tensor:
        """What ``peer`` announced for the transition that is carried out now."""
        number = self.started[0].number
        entry = self._ring + 2 * (number % _RING)
        offset, size = peer.words[entry], peer.words[entry + 1]
        if size != numel * dtype.itemsize:
            raise DisagreementError(
                f"rank {peer.rank} sends {size} bytes where rank {self.memory.rank} expects {numel * dtype.itemsize}: "
                f"they gather or reduce different units. Every rank must run the same model on the same path."
            )
        return peer.read(offset, size).view(dtype)

    def progress(self) -> None:
        """Carry out, in order, what all peers have started too, and forget what all have read."""
        while self.started and all(peer.words[self.count] >= self.started[0].number for peer in self.memory.peers):
            self.started[0].carry_out()
            self._mine[self._done] = self.started.popleft().number
        if self._kept:
            read = self._read_by_all()
            while self._kept and self._kept[0].number <= read:
                self.memory.take_back(self._kept.popleft())

    def _read_by_all(self) -> int:
        """The newest transition that all peers have carried out."""
        return min(peer.words[self._done] for peer in self.memory.peers)

    def is_read(self) -> bool:
        """Whether what this rank carried out was carried out by all."""
        return self._read_by_all() >= self._mine[self._done]

    def lacks(self, peer: Peer) -> bool:
        """Whether ``peer`` is behind this rank."""
        return any(peer.words[word] < self._mine[word] for word in (self.count, self._done))


def attach(rank: int, exchange: Callable[[Any], list[Any]], timeout: timedelta, *, wanted: bool) -> SharedMemory | None:
    """Memory shared with all ranks, if each wants that and has read every other's; else ``None`` on all. Collective.

    Args:
        exchange: gives every rank's value (of JSON), in rank order.
        timeout: how long a peer may keep this rank waiting.
    """
    arena, mine = None, None
    if wanted and sys.platform == "linux" and platform.machine() == "x86_64":
        with contextlib.suppress(OSError, ValueError, AttributeError):
            arena = Arena(_pages(2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
            mine = {"host": _host(), "pid": os.getpid(), "fd": arena.fd, "size": arena.size, "token": arena.token}
    everyone = exchange(mine)
    if any(other is None or other["host"] != everyone[0]["host"] for other in everyone):
        return None
    peers: list[Peer] | None = None
    with contextlib.suppress(OSError, ValueError):
        peers = [
            Peer(other, found["pid"], found["fd"], found["size"], found["token"])
            for other, found in enumerate(everyone)
            if other != rank
        ]
    if not all(exchange(peers is not None)):
        return None
    assert arena is not None and peers is not None
    return SharedMemory(rank, arena, peers, timeout)


def _host() -> list[Any]:
    """What two processes share that see each other's files under /proc."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [boot, os.stat("/proc/self/ns/pid").st_ino]


def _pages(size: int) -> int:
    """``size`` bytes, rounded up to whole pages and at least one."""
    return max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE
