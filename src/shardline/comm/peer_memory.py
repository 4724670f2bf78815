"""CPU ranks of one host read each other's memory: every byte is copied once, to where it is used.

To start a transition is to announce the address of this rank's part. To execute it is to read the parts of the peers
at the addresses that they announced, and to count it as executed. A part that was announced is kept, and not written,
until all peers have read it.

There is no thread for this. Whenever this rank starts or waits for anything, it executes everything that is due, so a
rank that waits for one transition does not block the others in another one.

The order "first the data, then the counter that announces it" holds on x86-64 as the program has it; other processors
need fences that Python does not have. Whether reading works is found out by trying; where it does not, gloo is used.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardline.comm.control_page import ControlPage, Peer
from shardline.comm.groups import Group
from shardline.comm.log import TransitionLog
from shardline.comm.transport import BLOCK, Scratch, Work, add_in_order, put
from shardline.errors import DisagreementError, LostRankError, ShardlineError, UsageError, text_of
from shardline.runtime.ending import has_failed
from shardline.watch import Channel, Operation, Ticket, Watch, WatchSettings
from shardline.watch.watch import is_ours, same_error

__all__ = ["PeerMemoryTransport", "Peers", "attach"]

_CHANNELS = 2
_RING = 1024
"""Announcements of a channel that may be unread; a sender blocks when there are more."""

_LINE = 8  # counters of a cache line: each counter that peers poll has a line of its own
_CHANNEL = 2 * _LINE + 3 * _RING  # counters: started | executed | ring of (address, bytes, label)
_PAGE = 8 * (_LINE + _CHANNELS * _CHANNEL)  # bytes

_YIELDS = 50  # rounds of waiting that only yield the processor, before the first sleep
_SLEEP, _LONGEST_SLEEP = 20e-6, 1e-3  # seconds
_LIVENESS_INTERVAL = 0.1  # seconds of waiting between checks whether the peers are alive
_DRAIN_SECONDS = 10.0  # to wait, at the end, for peers that have not read everything that was announced

_OPEN: list[weakref.ref[Peers]] = []
"""Of all engines of this process: while one waits, transitions of the others are executed too."""

_UNREAD: list[Tensor] = []
"""Parts that an engine announced and that were not read when it was collected: peers may still read them."""


def _transports() -> Iterator[PeerMemoryTransport]:
    for reference in tuple(_OPEN):
        peers = reference()
        if peers is not None and peers.pid == os.getpid():  # not those of the process that this one was forked from
            yield from peers.transports


def advance_all() -> None:
    """Execute what all ranks have started, and release what all have read, in all engines of this process."""
    for transport in _transports():
        transport.advance()


class Peers:
    """The other ranks of this host, and the waiting that all transports to them have in common."""

    def __init__(
        self,
        rank: int,
        page: ControlPage,
        peers: Sequence[Peer],
        timeout: timedelta,
        log: TransitionLog,
        watch: Watch | None = None,
    ) -> None:
        self.rank, self.page, self.peers = rank, page, list(peers)
        self.watch = watch or Watch(rank, WatchSettings(timeout=timeout.total_seconds()))
        self.pid, self._log = os.getpid(), log
        self.transports = [PeerMemoryTransport(self, channel, log) for channel in range(_CHANNELS)]
        for each in self.transports:
            weakref.finalize(self, _keep_unread, each.kept, each.executed, list(peers))
        _OPEN.append(weakref.ref(self, _OPEN.remove))
        # Runs at the end of processes of multiprocessing, too, where atexit does not.
        self._at_exit = Finalize(None, _drain_at_exit, (weakref.ref(self),), exitpriority=10)

    def give_up(self, error: ShardlineError | None) -> None:
        """Let the peers that wait for this rank raise ``error`` too; ``None`` takes it back."""
        self.page.post("" if error is None else f"{type(error).__name__}: {text_of(error)}")

    def wait_for_readers(self, patience: float | None = None) -> None:
        """Wait (``patience``: at most so many seconds) until no peer reads what this rank announced.

        That holds for transitions that this rank has executed. The peers have started those, so they will too.
        """
        for transport in self.transports:
            self.wait(transport.is_read, patience)
        advance_all()

    def check_unread(self, buffers: Iterable[Tensor]) -> None:
        """Check that no part that peers may still read overlaps ``buffers`` (dense).

        Raises:
            AssertionError: one does.
        """
        parts = [part for transport in self.transports for part in transport.unread()]
        if parts and any(_overlap(part, buffer) for buffer in buffers for part in parts):
            raise AssertionError("weights would be written while a peer still reads them: a wait is missing")

    def wait(
        self,
        done: Callable[[], bool],
        patience: float | None = None,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Execute what is due until ``done()``, or for ``patience`` seconds.

        Args:
            waiting: entered where that is not so at once.

        Raises:
            LostRankError: a peer ended, or did not start the same in time.
            DisagreementError: ranks wait for each other.
            UsageError: after :meth:`close`.
        """
        if not self.peers:
            raise UsageError("a transition was waited for after the engine that started it was destroyed.")
        advance_all()
        if done():
            return
        begin = time.monotonic()
        try:
            for _ in range(_YIELDS):
                os.sched_yield()
                advance_all()
                if done():
                    return
            with waiting():
                self._sleep_until(done, begin, patience)
        finally:
            self._log.waited += time.monotonic() - begin

    def _sleep_until(self, done: Callable[[], bool], begin: float, patience: float | None) -> None:
        nap = _SLEEP
        check = begin if self.watch.lost else begin + _LIVENESS_INTERVAL
        while True:
            advance_all()
            if done():
                return
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_SLEEP)
            now = time.monotonic()
            if patience is not None and now - begin > patience:
                return
            if now > check:
                check = now + _LIVENESS_INTERVAL
                self._check_alive(done, now - begin)

    def finish_started(self, done: Callable[[], bool], patience: float | None = None) -> None:
        """Execute what is due until nothing is left, or ``done()``: then the caller may block in other ways."""
        self.wait(lambda: done() or not any(each.started for each in _transports()), patience)

    def _check_alive(self, done: Callable[[], bool], waited: float) -> None:
        """Raise if a peer failed or ended, if ranks wait for each other, or if the timeout has passed."""
        gone = {peer.rank for peer in self.peers if not peer.is_alive() or self.watch.has_ended(peer.rank)}
        advance_all()  # with what they did before they ended
        behind = [peer for peer in self.peers if any(each.is_behind(peer) for each in self.transports)]
        if done():
            return
        for peer in behind:
            text = peer.posted() or self.watch.posted(peer.rank)
            if text and (peer.rank not in gone or is_ours(text)):
                raise self.watch.mark_lost(same_error(peer.rank, text))
        self.watch.check_not_lost()
        for peer in behind:
            if peer.rank in gone:
                raise self.watch.lose_ended(peer.rank, peer.pid)
        self.watch.check_certain(waited, [peer.rank for peer in behind])

    def drain(self) -> None:
        """Return when no peer will read this rank's memory any more: all have read what was announced, or ended."""
        with contextlib.suppress(ShardlineError, OSError):
            intact = [each for each in self.transports if not each.broken]
            self.wait(lambda: not any(each.kept or each.started for each in intact), patience=_DRAIN_SECONDS)

    def close(self) -> None:
        """Detach: to the peers this rank has ended."""
        self._at_exit.cancel()
        try:
            self.drain()
        finally:
            self.page.close()
            self.transports, self.peers = [], []
            _OPEN[:] = [other for other in _OPEN if other() is not self]


def _drain_at_exit(reference: weakref.ref[Peers]) -> None:
    """The process ends; after an uncaught error it does not wait."""
    peers = reference()
    if peers is not None and not has_failed():
        peers.drain()


def _keep_unread(kept: deque[tuple[int, Tensor]], executed: int, peers: Sequence[Peer]) -> None:
    """The engine was destroyed, or collected."""
    read = min(peer.counters[executed] for peer in peers)
    _UNREAD.extend(part for number, part in kept if number > read)


def _overlap(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() < other.data_ptr() + other.nbytes and other.data_ptr() < one.data_ptr() + one.nbytes


class PeerMemoryTransport:
    """One channel to the :class:`Peers`: its transitions are started and executed in one order."""

    def __init__(self, peers: Peers, channel: int, log: TransitionLog) -> None:
        self.peers, self.log, self._mine = peers, log, peers.page.counters
        self._channel = Channel(peers.watch, channel)
        # Numbers and actions of transitions that were started and not executed; peers may wait for them.
        self.started: deque[tuple[int, Callable[[], None]]] = deque()
        self.kept: deque[tuple[int, Tensor]] = deque()  # numbers and parts that perhaps not all have read
        self.broken = ""  # the exception that interrupted a transition
        # Indices on the control page: how many were started, how many executed, and the ring of announced parts.
        self.count = _LINE + channel * _CHANNEL
        self.executed, self._ring = self.count + _LINE, self.count + 2 * _LINE

    def gather(
        self,
        unit: int | None,
        buffer: Tensor,
        cuts: Sequence[int],
        own: Tensor | None = None,
        operation: Operation = Operation.GATHER,
    ) -> Work:
        self.log.record("gather", unit, cuts[-1], buffer.element_size())
        rank = self.peers.rank
        part = buffer[cuts[rank] : cuts[rank + 1]] if own is None else own

        def read_peers() -> None:
            put(part, buffer, cuts, rank)
            for peer in self.peers.peers:
                theirs = buffer[cuts[peer.rank] : cuts[peer.rank + 1]]
                peer.read(self._address(peer, theirs), theirs)

        ticket = self._channel.announce(operation, unit)
        return self._start(ticket, part, read_peers, hold=buffer, until_read=own is None)

    def reduce(
        self, unit: int, buffer: Tensor, cuts: Sequence[int], out: Tensor, *, add: bool, scratch: Scratch
    ) -> Work:
        self.log.record("reduce", unit, cuts[-1], buffer.element_size())
        rank, full = self.peers.rank, buffer[: cuts[-1]]
        low, high, width = cuts[rank], cuts[rank + 1], full.element_size()
        step = min(high - low, BLOCK)

        def add_up() -> None:
            places = [(peer, self._address(peer, full)) for peer in self.peers.peers]
            # Not from the scratch: this may run while the pool that lends it looks for a piece.
            rows = torch.empty(len(places), step, dtype=full.dtype, device="cpu")
            for start in range(low, high, max(1, step)):
                stop = min(start + step, high)
                parts = [row[: stop - start] for row in rows]
                for (peer, address), part in zip(places, parts, strict=True):
                    peer.read(address + start * width, part)
                parts.insert(rank, full[start:stop])
                add_in_order(parts, out[start - low : stop - low], add=add)

        ticket = self._channel.announce(Operation.REDUCE, unit)
        return self._start(ticket, full, add_up, hold=(buffer, out), until_read=False)

    def _start(
        self, ticket: Ticket, part: Tensor, execute: Callable[[], None], hold: object, *, until_read: bool
    ) -> Work:
        """Announce ``part``. With ``until_read`` the work waits for all readers: its owner may write it then."""
        self._check_intact()
        peers, mine = self.peers, self._mine
        waiting = partial(self._channel.waiting, ticket)
        number = mine[self.count] + 1
        if number - self._read_by_all() > _RING:
            peers.wait(lambda: number - self._read_by_all() <= _RING, waiting=waiting)
        entry = self._ring + 3 * (number % _RING)
        mine[entry], mine[entry + 1], mine[entry + 2] = part.data_ptr(), part.nbytes, ticket.label
        mine[self.count] = number
        self.started.append((number, execute))
        self.kept.append((number, part))
        advance_all()

        def done() -> bool:
            self._check_intact()
            return mine[self.executed] >= number and (not until_read or self._read_by_all() >= number)

        def arrived() -> bool:
            advance_all()
            return done()

        return Work((), lambda: peers.wait(done, waiting=waiting), hold=(part, hold), arrived=arrived)

    def _check_labels(self, number: int) -> None:
        """Check that what all ranks have started as transition ``number`` is the same.

        Raises:
            DisagreementError: it is not.
            ShardlineError: nor can it be, as a rank has given up.
        """
        entry = self._ring + 3 * (number % _RING) + 2
        mine = self._mine[entry]
        for peer in self.peers.peers:
            if peer.counters[entry] != mine:
                if text := peer.posted():
                    raise self.peers.watch.mark_lost(same_error(peer.rank, text))
                self._channel.refuse({self.peers.rank: mine, peer.rank: peer.counters[entry]})

    def _address(self, peer: Peer, part: Tensor) -> int:
        """The address in the memory of ``peer`` of its part, as large as ``part``, of the transition that is executed.

        Raises:
            DisagreementError: it has another size.
        """
        number, _ = self.started[0]
        entry = self._ring + 3 * (number % _RING)
        address, size = peer.counters[entry], peer.counters[entry + 1]
        if size != part.nbytes:
            raise DisagreementError(
                f"rank {peer.rank} sends {size} bytes where rank {self.peers.rank} expects {part.nbytes}: "
                f"they gather or reduce different units. Every rank must run the same model on the same path."
            )
        return address

    def advance(self) -> None:
        """Execute, in order, what all peers have started too, and release what all have read."""
        while self.started and all(peer.counters[self.count] >= self.started[0][0] for peer in self.peers.peers):
            number, execute = self.started[0]
            try:
                self._check_labels(number)
                execute()
            except BaseException as error:  # to start again would add terms twice
                self.broken = repr(error)
                self.started.clear()
                raise
            self._mine[self.executed] = number
            self.started.popleft()
        if self.kept:
            read = self._read_by_all()
            while self.kept and self.kept[0][0] <= read:
                self.kept.popleft()

    def _check_intact(self) -> None:
        if self.broken:
            raise UsageError(
                f"a transition of this engine was interrupted half-way by {self.broken}, so its buffers are not "
                f"complete. End the job, and resume it from a checkpoint."
            )

    def _read_by_all(self) -> int:
        """The newest transition that all peers have executed."""
        return min(peer.counters[self.executed] for peer in self.peers.peers)

    def is_read(self) -> bool:
        """Whether all peers have executed what this rank has executed."""
        return self._read_by_all() >= self._mine[self.executed]

    def unread(self) -> list[Tensor]:
        """The parts that were announced and that some peer has not read yet."""
        if not self.kept:
            return []
        read = self._read_by_all()
        return [part for number, part in self.kept if number > read]

    def is_behind(self, peer: Peer) -> bool:
        """Whether ``peer`` has started or executed less than this rank."""
        return any(peer.counters[index] < self._mine[index] for index in (self.count, self.executed))


def attach(
    group: Group,
    exchange: Callable[[Any], list[Any]],
    timeout: timedelta,
    log: TransitionLog,
    *,
    wanted: bool,
    watch: Watch | None = None,
) -> Peers | None:
    """The other ranks, if each wants that and has read every other's memory; else ``None`` on all. Collective.

    Args:
        exchange: gives every rank's value (of JSON), in rank order.
        timeout: how long this rank waits for a peer, if ``watch`` has no limit.
        log: of transitions.
        watch: what this rank sees of the others in any case.
    """
    page, mine = None, None
    if wanted and sys.platform == "linux" and platform.machine() == "x86_64":
        with contextlib.suppress(OSError, ValueError, AttributeError):
            page = ControlPage(_PAGE)
            mine = [_host(), os.getpid(), page.fd, page.size, page.counters[0], page.probe.data_ptr()]
    everyone = exchange(mine)
    if page is None or any(other is None or other[0] != everyone[0][0] for other in everyone):
        return None
    peers: list[Peer] = []
    readable = False
    with contextlib.suppress(OSError, ValueError, LostRankError):
        peers = [Peer(other, *found[1:]) for other, found in enumerate(everyone) if other != group.rank]
        readable = True
    if not all(exchange(readable)):
        return None
    return Peers(group.rank, page, peers, timeout, log, watch)


def _host() -> list[Any]:
    """The same for two processes that see each other's files under /proc."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [boot, os.stat("/proc/self/ns/pid").st_ino]
