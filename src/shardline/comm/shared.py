"""CPU ranks of one host read each other's buffers: nothing is copied but to where it is used.

Every rank has its buffers in an :class:`Arena` and maps those of its peers. To start a transition is to announce where
this rank's part lies. To carry it out is to take what this rank needs straight from where the others announced theirs,
and to say that it was read. What was announced is kept, and not written, until all have read it.

No thread does that: whatever is due is done whenever this rank starts or waits for anything, so a rank that waits for
one transition never keeps the others from theirs.

The order "first the data, then the word that announces it" holds on x86-64 as the program has it; elsewhere it would
take fences that Python has not. Whether all this works is found out by trying; where it does not, gloo does it all.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardline.comm.arena import Arena, Peer, in_pages
from shardline.comm.transport import Scratch, Work, add_in_order, put
from shardline.errors import DisagreementError, LostRankError, UsageError

__all__ = ["SharedMemory", "SharedTransport", "attach"]

_CHANNELS = 2
_RING = 1024
"""Announcements of a channel that can be unread; the next one waits."""

_LINE = 8  # words of a cache line: what one rank writes and another reads at once lie apart
_CHANNEL = 2 * _LINE + 2 * _RING  # words: started | carried out | ring of (offset, bytes)
_HEADER = 8 * (_LINE + _CHANNELS * _CHANNEL)  # bytes

_SMALL = in_pages(1)
"""Bytes below which a buffer stays in private memory, and is copied into the arena when it is announced."""

_COPIES = 2
"""Places of such copies that are kept for the next ones."""

_ROOM = 4
"""Size of all arenas together, in times of the host's memory. Only addresses: there is room for a rank that needs more
than the others and for holes, and the arenas of many ranks can all be mapped."""

_YIELDS = 50  # rounds of waiting that only let another process run, before the first sleep
_NAP, _LONGEST_NAP = 20e-6, 1e-3  # seconds
_LOOK = 0.1  # seconds of waiting between looks whether the peers still live


@dataclass(frozen=True)
class _Announced:
    """What the others read for a transition that this rank started."""

    number: int
    part: Tensor
    is_copy: bool


_OPEN: list[weakref.ref[SharedMemory]] = []
"""Of all engines of this process: one that waits goes on with what the others started."""


def _transports() -> Iterator[SharedTransport]:
    for reference in tuple(_OPEN):
        memory = reference()
        if memory is not None:
            yield from memory.transports


def progress() -> None:
    """Carry out what all ranks have started, and let go of what all have read."""
    for transport in _transports():
        transport.progress()


class SharedMemory:
    """This rank's arena and its peers', and the waiting that all transports over them have in common."""

    def __init__(self, rank: int, arena: Arena, peers: Sequence[Peer], timeout: timedelta) -> None:
        self.rank, self.arena, self.peers, self.timeout = rank, arena, list(peers), timeout.total_seconds()
        self._copies: list[Tensor] = []  # bytes in the arena for what lies elsewhere, not in use now
        self.transports = [SharedTransport(self, channel) for channel in range(_CHANNELS)]
        words = [(peer.words, count) for peer in peers for count in (each.count for each in self.transports)]
        arena.is_quiet = lambda: all(theirs[count + _LINE] >= arena.words[count] for theirs, count in words)
        _OPEN.append(weakref.ref(self, _OPEN.remove))

    @property
    def least(self) -> int:
        return _SMALL

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
        progress()

    def wait(self, over: Callable[[], bool], patience: float | None = None) -> None:
        """Do what is due until ``over()``, or for ``patience`` seconds.

        Raises:
            LostRankError: if a peer is gone, or does not come in time.
            UsageError: after :meth:`close`.
        """
        if not self.peers:
            raise UsageError("a transition was waited for after the engine that started it was destroyed.")
        turn, nap, begin = 0, _NAP, time.monotonic()
        look = begin + _LOOK
        while True:
            progress()
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
        self.wait(lambda: over() or not any(each.started for each in _transports()), patience)

    def _look(self, over: Callable[[], bool], waited: float) -> None:
        """See whether waiting has a sense."""
        gone = [peer for peer in self.peers if not peer.is_there()]
        progress()  # by what they did before they went
        gone = [peer for peer in gone if any(each.lacks(peer) for each in self.transports)]
        if gone and not over():
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
            copy = min(free, key=Tensor.numel) if free else self.arena.empty(in_pages(size), torch.uint8)
        except OSError as error:
            raise MemoryError(
                f"rank {self.rank} has no shared memory left for {size} bytes to send ({error}). Leave more memory "
                f'free on this host, or set "communication_transport" to "gloo".'
            ) from error
        self._copies = [other for other in self._copies if other is not copy]
        copy[:size].copy_(part.view(torch.uint8))
        return copy

    def take_back(self, announced: _Announced) -> None:
        """All have read it."""
        if announced.is_copy and announced.part.numel() <= 16 * _SMALL:
            self._copies = [*self._copies, announced.part][-_COPIES:]

    def close(self) -> None:
        """Leave: the others find this rank gone. Memory goes when nobody holds a buffer in it any more."""
        with contextlib.suppress(LostRankError, DisagreementError):
            self.finish_started(lambda: False, patience=_LOOK)
        quiet = self.arena.is_quiet()
        self.arena.is_quiet = lambda: quiet
        self.arena.close()
        self.transports, self.peers, self._copies = [], [], []
        _OPEN[:] = [other for other in _OPEN if other() is not self]


class SharedTransport:
    """One channel of a :class:`SharedMemory`: its transitions are started, and carried out, in one order."""

    def __init__(self, memory: SharedMemory, channel: int) -> None:
        self.memory, self._mine = memory, memory.arena.words
        # Numbers of what was started and not carried out, for which others may wait, and what there is to do.
        self.started: deque[tuple[int, Callable[[], None]]] = deque()
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
        announced = _Announced(number, shown, shown is not part)
        entry = self._ring + 2 * (number % _RING)
        mine[entry], mine[entry + 1] = memory.arena.place(shown) or 0, part.numel() * part.element_size()
        mine[self.count] = number
        self.started.append((number, carry_out))
        self._kept.append(announced)
        progress()
        to_the_end = keep and not announced.is_copy

        def over() -> bool:
            return mine[self._done] >= number and (not to_the_end or self._read_by_all() >= number)

        def arrived() -> bool:
            progress()
            return over()

        return Work((), lambda: memory.wait(over), hold=hold, arrived=arrived)

    def _read(self, peer: Peer, numel: int, dtype: torch.dtype) -> Tensor:
        """What ``peer`` announced for the transition that is carried out now."""
        number, _ = self.started[0]
        entry = self._ring + 2 * (number % _RING)
        offset, size = peer.words[entry], peer.words[entry + 1]
        if size != numel * dtype.itemsize:
            raise DisagreementError(
                f"rank {peer.rank} sends {size} bytes where rank {self.memory.rank} expects {numel * dtype.itemsize}: "
                f"they gather or reduce different units. Every rank must run the same model on the same path."
            )
        return peer.read(offset, numel, dtype)

    def progress(self) -> None:
        """Carry out, in order, what all peers have started too, and forget what all have read."""
        while self.started and all(peer.words[self.count] >= self.started[0][0] for peer in self.memory.peers):
            number, carry_out = self.started[0]
            carry_out()
            self._mine[self._done] = number
            self.started.popleft()
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


def attach(
    rank: int, world_size: int, exchange: Callable[[Any], list[Any]], timeout: timedelta, *, wanted: bool
) -> SharedMemory | None:
    """Memory shared with all ranks, if each wants that and has read every other's; else ``None`` on all. Collective.

    Args:
        exchange: gives every rank's value (of JSON), in rank order.
        timeout: how long a peer may keep this rank waiting.
    """
    arena, mine = None, None
    if wanted and sys.platform == "linux" and platform.machine() == "x86_64":
        with contextlib.suppress(OSError, ValueError):
            arena = Arena(_ROOM * os.sysconf("SC_PAGE_SIZE") * (os.sysconf("SC_PHYS_PAGES") // world_size), _HEADER)
            mine = [_host(), os.getpid(), arena.fd, arena.size, _HEADER, arena.token]
    everyone = exchange(mine)
    if any(other is None or other[0] != everyone[0][0] for other in everyone):
        return None
    peers: list[Peer] | None = None
    with contextlib.suppress(OSError, ValueError):
        peers = [Peer(other, *found[1:]) for other, found in enumerate(everyone) if other != rank]
    if not all(exchange(peers is not None)):
        return None
    assert arena is not None and peers is not None
    return SharedMemory(rank, arena, peers, timeout)


def _host() -> list[Any]:
    """Alike for two processes that see each other's files under /proc."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [boot, os.stat("/proc/self/ns/pid").st_ino]
