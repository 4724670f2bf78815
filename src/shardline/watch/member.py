"""Another rank of the group: what its page shows on the same host, or the table of its host on another one."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any

from shardline.runtime.shared_page import PeerPage, SharedPage
from shardline.watch import stacks
from shardline.watch.incident import Seen
from shardline.watch.status import HEAD, Cell, State, label_at, labels_of
from shardline.watch.tables import Row, Tables

__all__ = ["DistantMember", "Member", "NearMember", "describe"]

_PF_EXITING = 0x4  # of the kernel's flags of a process: it ends, and may still have its memory


def describe(page: SharedPage | None) -> dict[str, Any]:
    """What this process sends to the other ranks about itself once, at set-up."""
    found: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
    if page is not None:
        found["page"] = [page.fd, page.size, page.counters[0]]
        with contextlib.suppress(OSError, AttributeError, ValueError):
            found["stacks"] = stacks.listen()
    return found


def _machine() -> list[Any]:
    """The same for two processes that see each other's files under /proc."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [boot, os.stat("/proc/self/ns/pid").st_ino]
    return [socket.gethostname(), os.getpid()]


class Member:
    """What is known of one rank of the group, this one included; of this class where nothing is."""

    def __init__(self, rank: int, said: dict[str, Any]) -> None:
        self.rank, self.host, self.pid = rank, str(said["host"]), int(said["pid"])

    def label(self, channel: int, number: int) -> int | None:
        """Of its transfer ``number``; None where it has not started that, or where that is not known."""
        return None

    def started(self, channel: int) -> int | None:
        """How many transfers it has started; None where that is not known."""
        return None

    def has_ended(self) -> bool:
        """Whether its process is known to have ended, or to be ending."""
        return False

    def is_running(self) -> bool:
        """Whether its process is known to run."""
        return False

    def posted(self) -> str:
        """The text that it shows."""
        return ""

    def look(self) -> Seen | None:
        """What it does now; None where that is not known."""
        return None

    def stack(self) -> str:
        """The Python stack of its main thread; empty where that cannot be had."""
        return ""


class NearMember(Member):
    """A rank of this host, whose page this process maps.

    Raises:
        OSError, ValueError: its page cannot be read.
    """

    def __init__(self, rank: int, said: dict[str, Any]) -> None:
        super().__init__(rank, said)
        self._page = PeerPage(self.pid, *said["page"])
        self._stacks: int | None = said.get("stacks")

    def label(self, channel: int, number: int) -> int | None:
        return label_at(self._page.counters, channel, number)

    def started(self, channel: int) -> int | None:
        return self._page.counters[Cell.COUNT + channel]

    def has_ended(self) -> bool:
        return self._page.counters[Cell.STATE] == State.ENDED or not self._page.is_alive()

    def is_running(self) -> bool:
        with contextlib.suppress(OSError, IndexError, ValueError):
            state, *fields = self._state()
            return state not in "ZX" and not int(fields[5]) & _PF_EXITING
        return False

    def posted(self) -> str:
        return self._page.posted()

    def look(self) -> Seen:
        cells = tuple(self._page.counters[:HEAD])
        seconds = (time.monotonic_ns() - cells[Cell.SINCE]) / 1e9
        process = "ended" if not self._page.is_alive() else "stopped" if self._is_stopped() else "runs"
        labels = labels_of(self._page.counters, cells) if cells[Cell.STATE] == State.WAITING else ()
        return Seen(self.rank, self.host, self.pid, process, cells, seconds, labels=labels)

    def stack(self) -> str:
        return "" if self._stacks is None else stacks.stack_of(self.pid, self._stacks)

    def _is_stopped(self) -> bool:
        with contextlib.suppress(OSError, IndexError):
            return self._state()[0] in "Tt"
        return False

    def _state(self) -> list[str]:
        """The fields of its /proc/PID/stat from the third one on, which is the state."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()


class DistantMember(Member):
    """A rank of another host, as a table shows it.

    Args:
        tables: of the other hosts; ``lowest`` is the lowest rank of its host.
    """

    def __init__(self, rank: int, said: dict[str, Any], tables: Tables, lowest: int) -> None:
        super().__init__(rank, said)
        self._tables, self._lowest = tables, lowest

    def started(self, channel: int) -> int | None:
        row = self._row
        return None if row is None else row.cells[Cell.COUNT + channel]

    def has_ended(self) -> bool:
        row = self._row
        return row is not None and (row.cells[Cell.STATE] == State.ENDED or row.process in ("closed", "ended"))

    def is_running(self) -> bool:
        row = self._row
        return row is not None and row.process != "ended"

    def posted(self) -> str:
        row = self._row
        return "" if row is None else row.posted

    def look(self) -> Seen | None:
        row, silent = self._row, self._tables.silent_for(self._lowest)
        if silent:
            cells = (0,) * HEAD if row is None else row.cells
            return Seen(self.rank, self.host, self.pid, "silent", cells, silent, silent)
        if row is None:
            return None
        process = "ended" if row.process == "closed" else row.process
        return Seen(self.rank, self.host, self.pid, process, row.cells, row.seconds, row.quiet, row.labels)

    def stack(self) -> str:
        row = self._row
        return "" if row is None else row.stack

    @property
    def _row(self) -> Row | None:
        return self._tables.row(self._lowest, self.rank)
