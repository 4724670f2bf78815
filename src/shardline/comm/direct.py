"""CPU ranks of one host read each other's memory: nothing is copied but to where it is used.

To start a transition is to announce where this rank's part lies. To carry it out is to take what this rank needs
straight from where the others announced theirs, and to say that it was read. What was announced is kept, and not
written, until all have read it.

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
from datetime import timedelta
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardline import errors
from shardline.comm.board import Board, Peer
from shardline.comm.transport import BLOCK, Scratch, Work, add_in_order, put
from shardline.errors import DisagreementError, LostRankError, ShardlineError, UsageError, text_of

__all__ = ["DirectTransport", "Peers", "attach"]

_CHANNELS = 2
_RING = 1024
"""Announcements of a channel that can be unread; the next one waits."""

_LINE = 8  # words of a cache line: what one rank writes and another reads at once lie apart
_CHANNEL = 2 * _LINE + 2 * _RING  # words: started | carried out | ring of (address, bytes)
_BOARD = 8 * (_LINE + _CHANNELS * _CHANNEL)  # bytes

_YIELDS = 50  # rounds of waiting that only let another process run, before the first sleep
_NAP, _LONGEST_NAP = 20e-6, 1e-3  # seconds
_LOOK = 0.1  # seconds of waiting between looks whether the peers still live
_LEAVING = 10.0  # seconds to wait, at the end, for peers that have yet to read what was announced

_OPEN: list[weakref.ref[Peers]] = []
"""Of all engines of this process: one that waits goes on with what the others started."""

_UNREAD: list[Tensor] = []
"""What an engine announced that is gone before all have read it: it stays, for the latecomers."""


def _transports() -> Iterator[DirectTransport]:
    for reference in tuple(_OPEN):
        peers = reference()
        if peers is not None and peers.pid == os.getpid():  # not those of the process that this one was forked from
            yield from peers.transports


def progress() -> None:
    """Carry out what all ranks have started, and let go of what all have read."""
    for transport in _transports():
        transport.progress()


class Peers:
    """The other ranks of this host, and the waiting that all transports to them have in common."""

    def __init__(self, rank: int, board: Board, peers: Sequence[Peer], timeout: timedelta) -> None:
        self.rank, self.board, self.peers, self.timeout = rank, board, list(peers), timeout.total_seconds()
        self.pid = os.getpid()
        self.transports = [DirectTransport(self, channel) for channel in range(_CHANNELS)]
        for each in self.transports:
            weakref.finalize(self, _outlive, each.kept, each.done, list(peers))
        _OPEN.append(weakref.ref(self, _OPEN.remove))
        # Runs at the end of processes of multiprocessing, too, where atexit does not.
        self._at_exit = Finalize(None, _leave, (weakref.ref(self),), exitpriority=10)

    def give_up(self, error: ShardlineError | None) -> None:
        """Let the peers that wait for this rank raise ``error`` too; ``None`` takes it back."""
        self.board.say("" if error is None else f"{type(error).__name__}: {text_of(error)}")

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
        for peer in self.peers:
            if (text := peer.said()) and any(each.lacks(peer) for each in self.transports) and not over():
                raise _same_error(peer.rank, text)
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

    def leave(self) -> None:
        """Return when nobody will read this rank's memory any more: all have read what was announced, or are gone."""
        with contextlib.suppress(ShardlineError, OSError):
            whole = [each for each in self.transports if not each.broken]
            self.wait(lambda: not any(each.kept or each.started for each in whole), patience=_LEAVING)

    def close(self) -> None:
        """Leave: the others find this rank gone."""
        self._at_exit.cancel()
        try:
            self.leave()
        finally:
            self.board.close()
            self.transports, self.peers = [], []
            _OPEN[:] = [other for other in _OPEN if other() is not self]


def _same_error(rank: int, text: str) -> ShardlineError:
    """What a peer raised, here."""
    kind, _, said = text.partition(": ")
    known: type[ShardlineError] = getattr(errors, kind) if kind in errors.__all__ else ShardlineError
    return known(f"rank {rank} gave up: {said}")


def _leave(reference: weakref.ref[Peers]) -> None:
    """The process ends: of its own accord, or by an error, which need not wait."""
    peers = reference()
    if peers is not None and getattr(sys, "last_value", None) is None:
        peers.leave()


def _outlive(kept: deque[tuple[int, Tensor]], done: int, peers: Sequence[Peer]) -> None:
    """The engine is gone, by ``destroy`` or because nobody held it any more."""
    read = min(peer.words[done] for peer in peers)
    _UNREAD.extend(part for number, part in kept if number > read)


class DirectTransport:
    """One channel to the :class:`Peers`: its transitions are started, and carried out, in one order."""

    def __init__(self, peers: Peers, channel: int) -> None:
        self.peers, self._mine = peers, peers.board.words
        # Numbers of what was started and not carried out, for which others may wait, and what there is to do.
        self.started: deque[tuple[int, Callable[[], None]]] = deque()
        self.kept: deque[tuple[int, Tensor]] = deque()  # numbers and parts that perhaps not all have read
        self.broken = ""  # what ended a transition half-way
        # Where on the board: how many were started, how many carried out, and where the parts are.
        self.count = _LINE + channel * _CHANNEL
        self.done, self._ring = self.count + _LINE, self.count + 2 * _LINE

    def gather(self, own: Tensor, buffer: Tensor, boundaries: Sequence[int]) -> Work:
        in_place = own.data_ptr() == buffer[boundaries[self.peers.rank] :].data_ptr()

        def take() -> None:
            put(own, buffer, boundaries, self.peers.rank)
            for peer in self.peers.peers:
                part = buffer[boundaries[peer.rank] : boundaries[peer.rank + 1]]
                peer.read(self._address(peer, part), part)

        return self._start(own, take, hold=(own, buffer), to_the_end=in_place)

    def reduce(self, buffer: Tensor, boundaries: Sequence[int], out: Tensor, *, add: bool, scratch: Scratch) -> Work:
        rank, whole = self.peers.rank, buffer[: boundaries[-1]]
        low, high, width = boundaries[rank], boundaries[rank + 1], whole.element_size()
        step = min(high - low, BLOCK)

        def add_up() -> None:
            places = [(peer, self._address(peer, whole)) for peer in self.peers.peers]
            # Not of the scratch: this may run while the pool that lends it looks for a piece.
            rows = torch.empty(len(places), step, dtype=whole.dtype, device="cpu")
            for start in range(low, high, max(1, step)):
                stop = min(start + step, high)
                parts = [row[: stop - start] for row in rows]
                for (peer, address), part in zip(places, parts, strict=True):
                    peer.read(address + start * width, part)
                parts.insert(rank, whole[start:stop])
                add_in_order(parts, out[start - low : stop - low], add=add)

        return self._start(whole, add_up, hold=(buffer, out), to_the_end=False)

    def _start(self, part: Tensor, carry_out: Callable[[], None], hold: object, *, to_the_end: bool) -> Work:
        """Announce ``part``; ``to_the_end`` makes a wait one for all that read it: its owner may write it then."""
        self._check_whole()
        peers, mine = self.peers, self._mine
        number = mine[self.count] + 1
        if number - self._read_by_all() > _RING:
            peers.wait(lambda: number - self._read_by_all() <= _RING)
        entry = self._ring + 2 * (number % _RING)
        mine[entry], mine[entry + 1] = part.data_ptr(), part.nbytes
        mine[self.count] = number
        self.started.append((number, carry_out))
        self.kept.append((number, part))
        progress()

        def over() -> bool:
            self._check_whole()
            return mine[self.done] >= number and (not to_the_end or self._read_by_all() >= number)

        def arrived() -> bool:
            progress()
            return over()

        return Work((), lambda: peers.wait(over), hold=hold, arrived=arrived)

    def _address(self, peer: Peer, part: Tensor) -> int:
        """Where in its memory ``peer`` has what is as large as ``part``, for the transition that is carried out now."""
        number, _ = self.started[0]
        entry = self._ring + 2 * (number % _RING)
        address, size = peer.words[entry], peer.words[entry + 1]
        if size != part.nbytes:
            raise DisagreementError(
                f"rank {peer.rank} sends {size} bytes where rank {self.peers.rank} expects {part.nbytes}: "
                f"they gather or reduce different units. Every rank must run the same model on the same path."
            )
        return address

    def progress(self) -> None:
        """Carry out, in order, what all peers have started too, and forget what all have read."""
        while self.started and all(peer.words[self.count] >= self.started[0][0] for peer in self.peers.peers):
            number, carry_out = self.started[0]
            try:
                carry_out()
            except BaseException as error:  # to begin anew would add what was added
                self.broken = repr(error)
                self.started.clear()
                raise
            self._mine[self.done] = number
            self.started.popleft()
        if self.kept:
            read = self._read_by_all()
            while self.kept and self.kept[0][0] <= read:
                self.kept.popleft()

    def _check_whole(self) -> None:
        if self.broken:
            raise UsageError(
                f"a transition of this engine was ended half-way by {self.broken}, so its buffers are not whole. End "
                f"the job, and resume it from a checkpoint."
            )

    def _read_by_all(self) -> int:
        """The newest transition that all peers have carried out."""
        return min(peer.words[self.done] for peer in self.peers.peers)

    def is_read(self) -> bool:
        """Whether what this rank carried out was carried out by all."""
        return self._read_by_all() >= self._mine[self.done]

    def lacks(self, peer: Peer) -> bool:
        """Whether ``peer`` is behind this rank."""
        return any(peer.words[word] < self._mine[word] for word in (self.count, self.done))


def attach(
    rank: int, world_size: int, exchange: Callable[[Any], list[Any]], timeout: timedelta, *, wanted: bool
) -> Peers | None:
    """The other ranks, if each wants that and has read every other's memory; else ``None`` on all. Collective.

    Args:
        exchange: gives every rank's value (of JSON), in rank order.
        timeout: how long a peer may keep this rank waiting.
    """
    board, mine = None, None
    if wanted and sys.platform == "linux" and platform.machine() == "x86_64":
        with contextlib.suppress(OSError, ValueError, AttributeError):
            board = Board(_BOARD)
            mine = [_host(), os.getpid(), board.fd, board.size, board.words[0], board.probe.data_ptr()]
    everyone = exchange(mine)
    if any(other is None or other[0] != everyone[0][0] for other in everyone):
        return None
    peers: list[Peer] | None = None
    with contextlib.suppress(OSError, ValueError, LostRankError):
        peers = [Peer(other, *found[1:]) for other, found in enumerate(everyone) if other != rank]
    if not all(exchange(peers is not None)):
        return None
    if board is None or peers is None:
        raise AssertionError("every rank is ready to share memory, but this one is not")
    return Peers(rank, board, peers, timeout)


def _host() -> list[Any]:
    """Alike for two processes that see each other's files under /proc."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [boot, os.stat("/proc/self/ns/pid").st_ino]
