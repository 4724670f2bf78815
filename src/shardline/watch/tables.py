"""What ranks of other hosts do: the rows of a host in the rendezvous store, which its lowest live rank writes.

A host writes its table at most once a second. A rank reads those of other hosts only when it has waited, or lost a
connection. A thread does both, and no other thread waits for it: without a network a store may never answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import chain
from typing import Any

from shardline.runtime.network import PrefixStore, Store
from shardline.watch.status import CHANNELS, HEAD, Cell
from shardline.watch.words import CALLS, Phase, call_of, transfer

__all__ = ["Row", "Tables"]

_BEAT = 1.0  # seconds between two messages of one kind, at least
_SILENT = 4  # beats without a new table after which a host counts as silent
_ALARM_SECONDS = 2.0  # of waiting, before this rank asks whether anything went wrong on another host
_LAST_WORDS_SECONDS = 2.0
_ANSWER_SECONDS = 5.0
_ALARM = "alarm"


@dataclass(frozen=True)
class Row:
    """One rank, as a rank of its host sees it."""

    rank: int
    process: str
    """``runs``, ``stopped``, ``closed`` (its engine) or ``ended``."""
    seconds: float
    """How long it has been where it is."""
    quiet: float
    """How long it has written nothing new."""
    cells: tuple[int, ...]
    posted: str = ""
    stack: str = ""
    labels: tuple[tuple[int, ...], ...] = ()

    @property
    def is_alarming(self) -> bool:
        return bool(self.posted) or self.process in ("closed", "ended")


@dataclass
class _Table:
    """The newest rows of another host."""

    rows: Mapping[int, Row] = field(default_factory=dict)
    text: bytes = b""
    changed: float = 0.0
    """When this process read it first."""


class Tables:
    """Writes the table of this host, and reads those of the others.

    Args:
        store: makes a connection of its own to the rendezvous store.
        tag: the same on all ranks, and of no other group.
        here: the lowest rank of each host names it; that of this one.
        others: those of the other hosts.
        patience: seconds of waiting after which this rank reads.
    """

    def __init__(self, store: Callable[[], Store], tag: str, here: int, others: Sequence[int], patience: float) -> None:
        self._make, self._tag, self._here, self._patience = store, tag, here, patience
        self._tables = {other: _Table() for other in others}
        self._rows: Sequence[Row] = ()
        self._waited = 0.0
        self._wanted = 0.0  # since when the tables of the others are read; 0 where they are not
        self._urgent = self._alarm = self._over = False
        self._turn = 0
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shardline-tables", daemon=True)
        self._thread.start()

    # -- of the watching thread and the main thread -------------------------------------------------------------------

    def hand(self, rows: Sequence[Row]) -> None:
        """These are to be written next."""
        self._rows = rows

    def wait_has_lasted(self, seconds: float) -> None:
        """The main thread waits for so many ``seconds``; 0: not at all."""
        self._waited = seconds
        if self._urgent or seconds >= (_ALARM_SECONDS if self._alarm else self._patience):
            self._wanted = self._wanted or time.monotonic()
        else:
            self._wanted = 0.0

    def read_now(self) -> None:
        """A connection broke: read the tables from now on."""
        if not self._urgent:
            self._urgent, self._wanted = True, time.monotonic()
            self._wake.set()

    def row(self, host: int, rank: int) -> Row | None:
        """What is known of ``rank`` of ``host``."""
        return self._tables[host].rows.get(rank)

    def silent_for(self, host: int) -> float:
        """For how many seconds nothing new has come from ``host``; 0 where that is not known, or not long."""
        if not self._wanted:
            return 0.0
        silent = time.monotonic() - max(self._wanted, self._tables[host].changed)
        return silent if silent > _SILENT * _BEAT else 0.0

    def close(self, rows: Sequence[Row]) -> None:
        """Write ``rows``, the last ones, and end; a store that does not answer is not waited for."""
        if self._over:
            return
        self._rows, self._over = rows, True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(_LAST_WORDS_SECONDS)

    # -- of the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: from now on the other hosts are silent
            store = PrefixStore(f"shardline/watch/{self._tag}", self._make())
            store.set_timeout(timedelta(seconds=_ANSWER_SECONDS))
            while not self._over:
                self._write(store)
                self._read(store)
                self._wake.wait(_BEAT)
                self._wake.clear()
            self._write(store)

    def _write(self, store: Store) -> None:
        rows, self._rows = self._rows, ()
        if not rows:
            return
        self._turn += 1  # a reader sees that this is new, although nothing may have moved
        text = json.dumps({"by": os.getpid(), "turn": self._turn, "rows": [asdict(row) for row in rows]})
        store.set(str(self._here), text)
        if not self._alarm and any(row.is_alarming for row in rows):
            self._alarm = True
            store.set(_ALARM, "1")

    def _read(self, store: Store) -> None:
        if not self._wanted:
            if self._alarm or self._waited < _ALARM_SECONDS or not store.check([_ALARM]):
                return
            self._alarm, self._wanted = True, time.monotonic()
        for host, table in self._tables.items():
            if not store.check([str(host)]):
                continue
            text = store.get(str(host))
            if text != table.text:
                self._tables[host] = _Table(_parse(text), text, time.monotonic())


def _parse(text: bytes) -> dict[int, Row]:
    """The rows of a table by rank; none where it is not one."""
    with contextlib.suppress(ValueError, TypeError, LookupError):
        return {row.rank: row for row in map(_row, json.loads(text)["rows"])}
    return {}


def _row(fields: dict[str, Any]) -> Row:
    """A row, all of whose numbers have words."""
    cells = tuple(int(cell) for cell, _ in zip(fields["cells"], range(HEAD), strict=True))
    label = cells[Cell.LABEL]
    _ = Phase(cells[Cell.PHASE]), CALLS[cells[Cell.CALL]], range(CHANNELS)[cells[Cell.CHANNEL]]
    labels = tuple(tuple(map(int, each)) for each in fields["labels"])
    _ = [(transfer(each, ()), call_of(each)) for each in (label, *chain(*labels))]
    _ = labels and labels[CHANNELS - 1]
    return Row(
        int(fields["rank"]),
        str(fields["process"]),
        float(fields["seconds"]),
        float(fields["quiet"]),
        cells,
        str(fields["posted"]),
        str(fields["stack"]),
        labels,
    )
