"""Another rank of the group, as the page that it shares with its host shows it."""

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
from shardline.watch.status import CHANNELS, Cell, State, label_at

__all__ = ["Member", "describe"]

_HEAD = Cell.COUNT + CHANNELS


def describe(page: SharedPage | None) -> dict[str, Any]:
    """What this process tells the other ranks of itself once, at set-up."""
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
    """What is known of one rank of the group, this one included.

    Attributes:
        page: None where it is on another host, or has none.
    """

    def __init__(self, rank: int, said: dict[str, Any], *, here: bool) -> None:
        self.rank, self.host, self.pid = rank, str(said["host"]), int(said["pid"])
        self.page: PeerPage | None = None
        self._stacks: int | None = said.get("stacks")
        if here and "page" in said:
            with contextlib.suppress(OSError, ValueError):
                self.page = PeerPage(self.pid, *said["page"])

    def label(self, channel: int, number: int) -> int | None:
        """Of its transfer ``number``; None where it has not started that, or where it is not visible here."""
        return None if self.page is None else label_at(self.page.counters, channel, number)

    def started(self, channel: int) -> int | None:
        """How many transfers it has started; None where it is not visible here."""
        return None if self.page is None else self.page.counters[Cell.COUNT + channel]

    def has_ended(self) -> bool:
        """Whether its process is known to have ended, or to be ending."""
        page = self.page
        return page is not None and (page.counters[Cell.STATE] == State.ENDED or not page.is_alive())

    def is_running(self) -> bool:
        """Whether its process, on this host, runs."""
        with contextlib.suppress(OSError, IndexError):
            return self._state() not in "ZX"
        return False

    def posted(self) -> str:
        return "" if self.page is None else self.page.posted()

    def look(self) -> Seen | None:
        """What it does now; None where it is not visible here."""
        if self.page is None:
            return None
        cells = tuple(self.page.counters[:_HEAD])
        seconds = (time.monotonic_ns() - cells[Cell.SINCE]) / 1e9
        process = "ended" if not self.page.is_alive() else "stopped" if self._is_stopped() else "runs"
        return Seen(self.rank, self.host, self.pid, process, cells, seconds)

    def stack(self) -> str:
        """The Python stack of its main thread; empty where that cannot be had."""
        return "" if self.page is None or self._stacks is None else stacks.stack_of(self.pid, self._stacks)

    def _is_stopped(self) -> bool:
        with contextlib.suppress(OSError, IndexError):
            return self._state() in "Tt"
        return False

    def _state(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
