"""What the watch costs while all goes well: no message, no system call, and so many numbers written."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import shardline
from shardline.watch import Channel, Status, Ticket, tables
from shardline.watch.tables import Row, Tables
from tests.models import Mlp, regression
from tests.watch.situations import config

STEPS = 4
MESSAGES = ("broadcast", "all_gather", "all_to_all_single", "all_reduce", "barrier", "all_gather_into_tensor")


def engine_and_step(transport):
    torch.manual_seed(0)
    settings = config(3, transport, watchdog={"quiet_seconds": 60.0})
    engine, *_ = shardline.initialize(model=Mlp(), config=settings)

    def step(number):
        x, y = regression(4, seed=number)
        engine.backward(F.mse_loss(engine(x), y))
        engine.step()

    for number in range(3):
        step(number)
    return engine, step


def count_messages(watched):
    """What this rank asks of c10d in some steps over gloo."""
    engine, step = engine_and_step("gloo")
    counts = Counter()
    with pytest.MonkeyPatch.context() as patch:
        if not watched:
            patch.setattr(Channel, "start", lambda *args, **kwargs: Ticket(0, 0))
            patch.setattr(Channel, "finish", lambda self, handle, ticket: handle.wait())
        for name in MESSAGES:
            original = getattr(dist, name, None)
            if original is not None:
                patch.setattr(dist, name, lambda *args, _name=name, _call=original, **kwargs: (
                    counts.update([_name]), _call(*args, **kwargs))[1])  # fmt: skip
        for number in range(STEPS):
            step(number)
    tables_of_hosts = engine.comm.watch.tables
    engine.destroy()
    return dict(counts), tables_of_hosts is None


def test_no_message_is_sent_while_ranks_are_alike(ranks):
    watched, bare = ranks(count_messages, 2, True), ranks(count_messages, 2, False)
    assert watched == bare
    counts, on_one_host = watched[0]
    assert sum(counts.values()) > 0 and on_one_host


class Cells(list):
    """Counts the numbers that are written."""

    written = 0

    def __setitem__(self, index, value) -> None:
        self.written += 1
        super().__setitem__(index, value)


def count_writes(transport):
    engine, step = engine_and_step(transport)
    status, calls, in_c = engine.comm.watch.status, Counter(), Counter()
    cells = status.cells = Cells(status.cells)
    watch_folder = str(Path(tables.__file__).parent)

    def profile(frame, event, argument):
        if event == "c_call" and frame.f_code.co_filename.startswith(watch_folder):
            in_c[argument.__name__] += 1
        elif event == "call" and frame.f_code.co_filename.endswith("watch/status.py"):
            calls[frame.f_code.co_name] += 1

    try:
        sys.setprofile(profile)
        for number in range(STEPS):
            step(number)
    finally:
        sys.setprofile(None)
    written = cells.written
    engine.destroy()
    return written, dict(calls), dict(in_c)


@pytest.mark.parametrize("transport", ["auto", "gloo"])
def test_what_a_step_writes(ranks, transport):
    each = {"start": 2, "wait": 5, "go_on": 2, "enter": 2, "count": 2, "leave": 0}
    for written, calls, in_c in ranks(count_writes, 2, transport):
        assert written == sum(each.get(name, 0) * count for name, count in calls.items())
        assert calls["start"] > 0 and calls["enter"] >= 3 * STEPS
        # Those of the clock, which is not a system call, and of objects. No file, no socket, no lock, no sleep.
        assert set(in_c) <= {"monotonic_ns", "monotonic", "__new__", "wait", "is_completed", "append", "values", "next"}


class Store:
    """Counts requests."""

    def __init__(self) -> None:
        self.requests = Counter()

    def set(self, key, text):
        self.requests["set"] += 1

    def check(self, keys):
        self.requests["check"] += 1
        return False


def test_a_host_writes_one_message_a_beat_and_reads_nothing_while_its_ranks_do_not_wait_long(monkeypatch):
    monkeypatch.setattr(Tables, "_run", lambda self: None)  # its thread: the beats are made here
    made, store = Tables(lambda: store, "tag", 0, [2, 4], patience=5.0), Store()
    row = Row(0, "runs", 0.0, 0.0, tuple(Status().cells[: tables.HEAD]))
    for _ in range(10):
        for _ in range(3):  # looks of the watching thread
            made.hand([row])
            made.wait_has_lasted(0.5)
        made._write(store)
        made._read(store)
    made._write(store)  # without news
    assert store.requests == {"set": 10}
    made.wait_has_lasted(3.0)
    made._read(store)
    assert store.requests == {"set": 10, "check": 1}, "whether anything went wrong elsewhere"
    made.wait_has_lasted(6.0)
    made._read(store)
    assert store.requests == {"set": 10, "check": 3}, "one for each host"
    made.close([])
