"""The thread that acts when its rank waits and nothing moves: it reports who waits for whom, once for each incident."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import weakref
from collections.abc import Sequence

from shardline.errors import LostRankError
from shardline.runtime.ending import record_exit
from shardline.watch.exits import Exits
from shardline.watch.incident import Incident, Seen, find, those
from shardline.watch.status import Cell
from shardline.watch.tables import Tables
from shardline.watch.watch import Watch

__all__ = ["Watchdog"]

_TURN = 1.0  # seconds between two looks, at most
_SOON = 0.02  # the same after the end of a rank, until this one waits for it
_SOON_SECONDS = 1.0
_STILL = 3  # turns after which a watching thread that does not move counts as stopped


class Watchdog:
    """Watches one :class:`Watch` until it is stopped, or ``owner`` is collected."""

    def __init__(self, watch: Watch, owner: object) -> None:
        self._watch = watch
        self._turn = min(_TURN, watch.settings.quiet_seconds / 5)
        self._over = threading.Event()
        self._moves = _Moves(len(watch.members))
        self._begin = 0.0  # of the incident that was found; 0 where there is none
        self._said = False
        self._stacks: dict[int, str] = {}  # of ranks of this host that neither wait nor move
        self._ended: dict[int, float] = {}  # ranks of this host that ended just now, and when
        self._exits = Exits({each.rank: each.pid for each in watch.near if each.rank != watch.rank})
        self._thread = threading.Thread(target=self._run, name="shardline-watch", daemon=True)
        self._thread.start()
        self.stop = weakref.finalize(owner, _stop, self._over, self._exits, self._thread)

    def _run(self) -> None:
        turn = 0.0
        while not self._over.is_set():
            ended, now = self._exits.wait(_SOON if self._ended else self._turn), time.monotonic()
            with contextlib.suppress(OSError, ValueError):  # a page that is closed meanwhile
                self._ended.update(dict.fromkeys(ended, now))
                self._tell_ends(now)
                if now - turn > self._turn / 2:
                    turn = now
                    self._watch.status.cells[Cell.THREAD] += 1
                    self._look()
                    self._watch.look_at_device()
        self._exits.close()
        if self._watch.incident is not None:
            self._withdraw(self._watch.incident, time.monotonic())

    def _look(self) -> None:
        watch = self._watch
        seen, now = watch.look(), time.monotonic()
        quiet = self._moves.quiet_since(seen, now)
        mine = next((each for each in seen if each.rank == watch.rank), None)
        if watch.tables is not None:
            watch.tables.wait_has_lasted(mine.seconds if mine is not None and mine.waits else 0.0)
            self._report(watch.tables, now)
        if mine is None or not mine.waits or now - quiet < watch.settings.quiet_seconds:
            if watch.incident is not None and (mine is None or not mine.waits or quiet > self._begin):
                self._withdraw(watch.incident, now)
            return
        if watch.incident is not None:
            return
        found = find(seen, watch.names)
        if found is None or any(watch.has_ended(rank) for rank in found.absent):  # the main thread says so by itself
            return
        watch.incident, self._begin = found, quiet
        if found.certain:
            return  # the main thread raises it
        if watch.rank == min(each.rank for each in seen if each.waits and self._moves.is_live(each.rank)):
            self._said = True
            stacks = (watch.members[rank] for rank in found.absent)
            dumps = [f"\nRank {each.rank}: {text}" for each in stacks if (text := each.stack())]
            _say(watch, f"for {now - quiet:.0f} s nothing has moved: {found.text}{''.join(dumps)}")

    def _tell_ends(self, now: float) -> None:
        """Say how a rank ended that left no word, if this one waits for it, and is the first that does.

        The main thread finds that as well, and raises. But it may be too late for words: a launcher that sees the end
        of one rank ends the others a moment later.
        """
        watch = self._watch
        for rank, since in list(self._ended.items()):
            theirs = watch.members[rank].look()
            waiting = [each.rank for each in watch.near if theirs is not None and each.look().waits_for(theirs)]
            if watch.posted(rank) or watch.lost or now - since > _SOON_SECONDS:
                del self._ended[rank]
            elif watch.rank in waiting:
                del self._ended[rank]
                if watch.rank == min(waiting):
                    watch.told = True
                    pid = watch.members[rank].pid
                    sentence = watch.how_it_ended(rank, pid)
                    if not record_exit(pid, sentence):
                        _write(f"shardline: {LostRankError(sentence)}\n")

    def _report(self, tables: Tables, now: float) -> None:
        """Hand the rows of this host over, if this is its lowest rank whose watching thread runs."""
        watch, still = self._watch, {}
        if watch.rank != min(each.rank for each in watch.near if self._moves.is_live(each.rank)):
            return
        quiet = [now - moved for moved in self._moves.moved]
        for each in watch.near:
            seen = each.look()
            if seen.process == "runs" and not seen.waits and quiet[each.rank] > watch.settings.quiet_seconds / 2:
                known = self._stacks.get(each.rank)
                still[each.rank] = each.stack() if known is None else known
        self._stacks = still
        tables.hand(watch.rows(quiet, still))

    def _withdraw(self, incident: Incident, now: float) -> None:
        self._watch.incident = None
        said, self._said = self._said, False
        if said and not self._watch.lost:
            whom = f"rank {those(incident.absent)} has come" if incident.absent else "the transfer has come"
            _say(self._watch, f"{whom} after {now - self._begin:.0f} s, and the job goes on.")


class _Moves:
    """When ranks were last seen to move."""

    def __init__(self, ranks: int) -> None:
        self._cells: dict[int, tuple[int, ...]] = {}
        self._threads = [(-1, 0)] * ranks  # turns of each watching thread, and looks since it moved
        self.moved = [time.monotonic()] * ranks
        """When each main thread has last written something new, as far as is known."""

    def quiet_since(self, seen: Sequence[Seen], now: float) -> float:
        """Since when nothing that any main thread wrote has changed."""
        for each in seen:
            turns, still = self._threads[each.rank]
            now_turns = each.cells[Cell.THREAD]
            self._threads[each.rank] = (now_turns, still + 1 if turns == now_turns else 0)
            cells = each.cells[: Cell.THREAD] + each.cells[Cell.THREAD + 1 :]
            if self._cells.get(each.rank) != cells:
                self._cells[each.rank] = cells
                self.moved[each.rank] = now - each.quiet
        return max(self.moved[each.rank] for each in seen)

    def is_live(self, rank: int) -> bool:
        return self._threads[rank][1] < _STILL


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
        sys.stderr.write(text)
        sys.stderr.flush()


def _say(watch: Watch, text: str) -> None:
    _write(f"shardline: {text}\n")
    folder = watch.settings.folder
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "incidents.txt", "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')} rank {watch.rank}: {text}\n")


def _stop(over: threading.Event, exits: Exits, thread: threading.Thread) -> None:
    over.set()
    exits.wake()
    if thread is not threading.current_thread():
        thread.join()
