"""What the ranks of one group see of each other, and waits that end when a rank will not join."""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import re
import secrets
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch.distributed as dist

from shardline import errors
from shardline.errors import DisagreementError, LostRankError, ShardlineError, text_of
from shardline.runtime.ending import note_lost_ranks, record_exit
from shardline.runtime.network import Store
from shardline.runtime.shared_page import SharedPage
from shardline.watch import uncaught
from shardline.watch.incident import Incident, Seen, find, out_of_step, position, those
from shardline.watch.member import DistantMember, Member, NearMember, describe
from shardline.watch.status import HEAD, SIZE, Cell, State, Status
from shardline.watch.tables import Row, Tables
from shardline.watch.words import transfer

__all__ = ["Channel", "Ticket", "Watch", "WatchSettings", "is_ours", "open_watches", "same_error"]

_SLICE = timedelta(seconds=0.1)  # of waiting for a backend, between looks at the other ranks
_BEFORE = "a rank was lost, or out of step, before"
_CAUSE_SECONDS = 2.0  # from a broken connection until the rank at its other end is seen to end
_DISTANT_CAUSE_SECONDS = 6.0  # the same where that may be on another host, or the whole host is gone
_FLIGHT_SECONDS = 1.0  # what a rank sent before it ended may still arrive

E = TypeVar("E", bound=ShardlineError)

_OPEN: weakref.WeakSet[Watch] = weakref.WeakSet()


@dataclass(frozen=True)
class WatchSettings:
    """How a watch behaves."""

    quiet_seconds: float = 10.0
    """How long this rank waits, and nothing moves, before it is said who waits for whom."""
    timeout: float = 600.0
    """How long this rank waits for another before the job ends."""
    folder: Path | None = None
    """Where the file with what was said lies; None: nowhere."""


class Watch:
    """The ranks of one group, as this one sees them.

    Attributes:
        status: what this rank does.
        members: all ranks, this one included, in rank order; empty in a single process.
        tables: of the other hosts; None where all ranks are on this one.
        names: of the units, for sentences.
        lost: why no rank is to be waited for any more; empty while all is well.
        told: whether the watching thread has said already which rank is lost.
        incident: what the watching thread has found, while it lasts.
    """

    def __init__(self, rank: int, settings: WatchSettings, page: SharedPage | None = None) -> None:
        self.rank, self.settings, self.pid = rank, settings, os.getpid()
        self.page = page
        self.status = Status(None if page is None else page.counters[:SIZE])
        self.members: list[Member] = []
        self.tables: Tables | None = None
        self.names: Sequence[str] = ()
        self.lost = ""
        self.told = False
        self.incident: Incident | None = None
        self._device_wait: _DeviceWait | None = None

    @classmethod
    def join(
        cls,
        rank: int,
        settings: WatchSettings,
        exchange: Callable[[Any], list[Any]],
        store: Callable[[], Store] | None = None,
    ) -> Watch:
        """A watch over the ranks that ``exchange`` (of JSON) reaches. Collective.

        Args:
            store: makes a connection to the rendezvous store, for what ranks of several hosts see of each other.
        """
        page = None
        with contextlib.suppress(OSError, AttributeError):
            page = SharedPage(8 * SIZE)
        made = cls(rank, settings, page)
        cards = exchange({**describe(page), "tag": secrets.token_hex(8)})
        made._meet(cards, store)
        _OPEN.add(made)
        uncaught.listen()
        _end_at_exit()
        return made

    def _meet(self, cards: Sequence[dict[str, Any]], store: Callable[[], Store] | None) -> None:
        """Know the other ranks by what they said of themselves."""
        lowest: dict[str, int] = {}  # rank of each host
        hosts = [lowest.setdefault(json.dumps(said["machine"]), rank) for rank, said in enumerate(cards)]
        here = hosts[self.rank]
        if store is not None and len(lowest) > 1:
            others = [host for host in lowest.values() if host != here]
            self.tables = Tables(store, cards[0]["tag"], here, others, self.settings.quiet_seconds / 2)
        for rank, (said, host) in enumerate(zip(cards, hosts, strict=True)):
            member = Member(rank, said)
            if host != here and self.tables is not None:
                member = DistantMember(rank, said, self.tables, host)
            elif host == here and "page" in said:
                with contextlib.suppress(OSError, ValueError):
                    member = NearMember(rank, said)
            self.members.append(member)

    def channel(self, index: int) -> Channel:
        return Channel(self, index)

    def close(self) -> None:
        """To the others this rank has ended."""
        _OPEN.discard(self)
        note_lost_ranks(self, lost=False)
        if self.page is not None:
            self.page.close()
        self.say_last()

    def say_last(self) -> None:
        """Write how the ranks of this host are, for the last time."""
        if self.tables is not None:
            self.tables.close(self.rows())

    def rows(self, quiet: Sequence[float] = (), stacks: Mapping[int, str] | None = None) -> list[Row]:
        """What the ranks of other hosts learn of those of this one.

        Args:
            quiet: how long each rank of the group has written nothing new.
            stacks: those that are known, by rank.
        """
        found = []
        for each in self.near:
            seen, rank = each.look(), each.rank
            process = "closed" if seen.process == "ended" and each.is_running() else seen.process
            still, stack = quiet[rank] if quiet else 0.0, (stacks or {}).get(rank, "")
            labels = seen.labels if still > self.settings.quiet_seconds / 2 else ()
            found.append(Row(rank, process, seen.seconds, still, seen.cells, each.posted(), stack, labels))
        return found

    @property
    def near(self) -> list[NearMember]:
        """The ranks of this host, this one included."""
        return [each for each in self.members if isinstance(each, NearMember)]

    # -- what goes wrong ----------------------------------------------------------------------------------------------

    def give_up(self, error: ShardlineError | None) -> None:
        """Let ranks that wait for this one raise ``error`` too; ``None`` takes it back."""
        if self.page is not None:
            self.page.post("" if error is None else f"{type(error).__name__}: {text_of(error)}")

    def fail(self, error: BaseException) -> None:
        """The process ends by ``error``: publish it to the other ranks."""
        if self.page is not None:
            if not self.page.shows:
                self.page.post(f"{type(error).__name__}: {text_of(error)}")
            self.status.end()
            self.say_last()

    def has_ended(self, rank: int) -> bool:
        """Whether the process of ``rank`` is known to have ended, or to be ending."""
        return bool(self.members) and self.members[rank].has_ended()

    def posted(self, rank: int) -> str:
        """The text that ``rank`` shows."""
        return self.members[rank].posted() if self.members else ""

    def lose(self, sentence: str) -> LostRankError:
        """The error that says so; from now on this rank waits for no other."""
        return self.mark_lost(LostRankError(sentence))

    def lose_ended(self, rank: int, pid: int) -> LostRankError:
        """The same of a rank whose process, ``pid``, has ended; what it did not say itself the launcher can say."""
        sentence = self.how_it_ended(rank, pid)
        if not self.posted(rank):
            record_exit(pid, sentence)
        return self.lose(sentence)

    def mark_lost(self, error: E) -> E:
        """The same after any error from which ranks cannot come back together."""
        if not self.lost:
            self.lost = error.message
            note_lost_ranks(self, lost=True)
        error.__suppress_context__ = True  # that a slice of waiting was over
        # torch's hooks after a forward wait once more, and torch says so in four lines
        warnings.filterwarnings("ignore", message=f".*silenced as another error was raised.*{_BEFORE}")
        return error

    def check_not_lost(self) -> None:
        """Check that no other rank is known to be lost.

        Raises:
            LostRankError: one is.
        """
        if self.lost:
            raise LostRankError(f"{_BEFORE}, so ranks can do nothing together any more: {self.lost}")

    def check_certain(self, waited: float, late: Sequence[int]) -> None:
        """Check, after ``waited`` seconds, that a wait for the ranks ``late`` may still end.

        Raises:
            LostRankError: the timeout has passed.
            DisagreementError: ranks wait for each other.
        """
        incident = self.incident
        if incident is not None and incident.certain:
            error = self.mark_lost(DisagreementError(incident.text))
            self.give_up(error)
            raise error
        if waited > self.settings.timeout:
            seen = self.look()
            runs = all(each.process == "runs" for each in seen if each.rank in late)
            how = ", which runs but does not come" if runs else ""
            whom = f"rank {those(late)}{how}" if late else "a transfer that does not come"
            found = find(seen, self.names)
            why = f" {found.why}" if found is not None and found.absent else ""
            raise self.lose(
                f"rank {self.rank} waited {self.settings.timeout:g} s for {whom}, {self.here()}.{why} Every rank must "
                f"take the same steps; what keeps one longer needs a longer timeout."
            )

    def check(self, channel: int, number: int, waited: float) -> None:
        """See, while this rank waits for transfer ``number`` of ``channel``, whether a rank will not join it.

        Raises:
            ShardlineError: what another rank raised and has posted.
            LostRankError: a rank ended, or does not come in time.
            DisagreementError: ranks wait for each other.
        """
        late = [each for each in self.members if (started := each.started(channel)) is not None and started < number]
        # A rank that was lost by itself comes before one that ended because it lost that.
        for each in sorted(self.members if waited >= _FLIGHT_SECONDS else late, key=_has_lost_another):
            if each.rank == self.rank:
                continue
            text = each.posted()
            if text and (is_ours(text) or not each.has_ended()):
                raise self.mark_lost(same_error(each.rank, text))
            if each.has_ended():
                raise self.lose_ended(each.rank, each.pid)
        self.check_certain(waited, [each.rank for each in late])

    @contextmanager
    def waiting_for_device(self, channel: Channel, ticket: Ticket, abort: Callable[[], object]) -> Iterator[None]:
        """Within it the main thread waits for a device, which waits for a transfer: nothing here can look meanwhile.

        So the watching thread does. Where the transfer will not come it calls ``abort``, which ends the device's wait,
        and what it found is raised here.

        Raises:
            ShardlineError: as :meth:`check`.
        """
        self._device_wait = wait = _DeviceWait(channel.index, ticket.number, abort, time.monotonic())
        try:
            with channel.waiting(ticket):
                yield
        except RuntimeError:  # what the device says of an abort
            if wait.found is None:
                raise
        finally:
            self._device_wait = None
        if wait.found is not None:
            raise wait.found

    def look_at_device(self) -> None:
        """Of the watching thread: abort what the device waits for, where that will not come."""
        wait = self._device_wait
        if wait is None or wait.found is not None:
            return
        try:
            self.check(wait.channel, wait.number, time.monotonic() - wait.begin)
        except ShardlineError as error:
            wait.found = error
            wait.abort()

    def look(self) -> list[Seen]:
        """What the ranks do now, as far as it can be known here."""
        return [seen for seen in (each.look() for each in self.members) if seen is not None]

    # -- in words -----------------------------------------------------------------------------------------------------

    def how_it_ended(self, rank: int, pid: int) -> str:
        """``rank``, whose process was ``pid``, has ended while this one waits for it."""
        while_waiting = f"while rank {self.rank} waits {self.here()}"
        seen = self.members[rank].look() if self.members else None
        if seen is None:
            how = "ended, or closed its engine,"
            return f"rank {rank} (process {pid}) {how} {while_waiting}. What that rank printed last says why."
        closed = self.members[rank].is_running() and seen.cells[Cell.STATE] != State.ENDED
        how = "closed its engine" if closed else "ended"
        said = f"rank {rank} (process {pid}) {how} {while_waiting}. It was {position(seen, self.names)}."
        if closed:
            return f"{said} Every rank must take the same steps, and call destroy() after them."
        if text := self.members[rank].posted():
            return f"{said} It said: {text}"
        if seen.cells[Cell.STATE] == State.ENDED:
            return f"{said} It ended by itself: its script was over, or its data, or it called sys.exit()."
        return f"{said} It left no word, as after os._exit(), SIGKILL (often for lack of memory) or a crash in C code."

    def here(self) -> str:
        """Where this rank is."""
        seen = Seen(self.rank, "", 0, "runs", tuple(self.status.cells[:HEAD]), 0.0)
        return f"in {transfer(seen.cells[Cell.LABEL], self.names)} {position(seen, self.names)}"


@dataclass
class _DeviceWait:
    channel: int
    number: int
    abort: Callable[[], object]
    begin: float
    found: ShardlineError | None = None


class Ticket(NamedTuple):
    """A transfer that was started."""

    number: int
    """On its channel, from 1."""
    label: int


class Channel:
    """Transfers that have one order on all ranks: those of one process group."""

    def __init__(self, watch: Watch, index: int) -> None:
        self.watch, self.index = watch, index
        self._start = watch.status.start

    def announce(self, operation: int, unit: int | None = None) -> Ticket:
        """A transfer is about to start.

        Raises:
            LostRankError: no rank would join it any more. It could match another one, of a rank that does not know yet.
        """
        self.watch.check_not_lost()
        return Ticket(*self._start(self.index, operation, unit))

    def start(self, operation: int, unit: int | None = None) -> Ticket:
        """The same, compared with what the others of this host have started as their transfer of this number.

        Raises:
            DisagreementError: another rank has started another one.
            LostRankError: as :meth:`take`.
        """
        number, label = ticket = self.announce(operation, unit)
        for each in self.watch.members:
            theirs = each.label(self.index, number)
            if theirs is not None and theirs != label:
                if (text := each.posted()) and is_ours(text):
                    raise self.watch.mark_lost(same_error(each.rank, text))
                self.refuse({self.watch.rank: label, each.rank: theirs})
        return ticket

    def refuse(self, labels: dict[int, int]) -> NoReturn:
        """Ranks are about to exchange different things: ``labels`` by rank."""
        said, why = out_of_step(self.watch.status.cells[Cell.STEP], labels, self.watch.names)
        sentence = f"ranks are out of step, and nothing was exchanged: {said}. {why}"
        error = self.watch.mark_lost(DisagreementError(sentence))
        self.watch.give_up(error)
        raise error

    @contextmanager
    def waiting(self, ticket: Ticket) -> Iterator[None]:
        """Within it this rank waits for a transfer."""
        status = self.watch.status
        status.wait(self.index, *ticket)
        try:
            yield
        finally:
            status.go_on()

    def finish(self, handle: dist.Work, ticket: Ticket) -> None:
        """Wait for a transfer of c10d between host memories.

        Raises:
            ShardlineError: as :meth:`Watch.check`.
            LostRankError: also where c10d gave up.
        """
        watch = self.watch
        watch.check_not_lost()
        with self.waiting(ticket):
            begin = time.monotonic()
            while True:
                try:
                    handle.wait(_SLICE)
                    return
                except RuntimeError:
                    waited = time.monotonic() - begin
                    if handle.is_completed():
                        self._end(handle, ticket.number)
                        return
                watch.check(self.index, ticket.number, waited)

    def _end(self, handle: dist.Work, number: int) -> None:
        """``handle`` is over: either since the slice ended, or c10d gave up, by its own timeout (ours) or an error."""
        try:
            handle.wait(_SLICE)
        except RuntimeError as error:
            self._explain(error, number)

    def _explain(self, error: RuntimeError, number: int) -> NoReturn:
        """Say in our words why c10d gave up on transfer ``number``."""
        watch = self.watch
        if re.search("timed out|timeout", str(error), re.IGNORECASE):
            watch.check(self.index, number, math.inf)
        patience = _CAUSE_SECONDS
        if watch.tables is not None:
            watch.tables.read_now()
            patience = _DISTANT_CAUSE_SECONDS
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            watch.check(self.index, number, _FLIGHT_SECONDS)
            time.sleep(0.02)
        found = find(watch.look(), watch.names)
        why = f" {found.why}" if found is not None and found.absent else ""
        raise watch.lose(f"rank {watch.rank} lost the others {watch.here()}: {_in_short(error)}.{why}") from error


def _has_lost_another(member: Member) -> bool:
    return member.posted().startswith(LostRankError.__name__)


def is_ours(text: str) -> bool:
    """Whether a posted text is that of an error which all ranks raise alike."""
    kind = text.partition(": ")[0]
    return kind in errors.__all__ and kind != LostRankError.__name__


def same_error(rank: int, text: str) -> ShardlineError:
    """The error that a peer raised, on this rank."""
    kind, _, message = text.partition(": ")
    known: type[ShardlineError] = getattr(errors, kind) if kind in errors.__all__ else ShardlineError
    return known(message if uncaught.GAVE_UP.match(message) else f"rank {rank} gave up: {message}")


def _in_short(error: RuntimeError) -> str:
    """gloo's message, without the place in its source and its advice."""
    text = re.sub(r"^(\[[^\]]*\.(cc|cpp|h):\d+\] *)+", "", str(error).partition("\n")[0])
    return text.partition(". This is typically")[0].rstrip(". ")


def open_watches() -> list[Watch]:
    """Those of this process; not those of the process that it was forked from."""
    return [each for each in tuple(_OPEN) if each.pid == os.getpid()]


@cache
def _end_at_exit() -> None:
    """Publish to the other ranks that this process ends, before it closes its connections."""

    def end_all() -> None:
        for watch in open_watches():
            watch.status.end()
            watch.say_last()

    atexit.register(end_all)
