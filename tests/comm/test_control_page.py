"""The control page that other processes map, and the memory that they read: right, refused, or gone."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from shardline.comm import control_page as page_module
from shardline.comm.control_page import ControlPage, Peer
from shardline.errors import LostRankError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd_create")

SIZE = 2 * mmap.PAGESIZE


def peer_of(page: ControlPage, **wrong: int) -> Peer:
    found = {"pid": os.getpid(), "fd": page.fd, "size": SIZE, "token": page.counters[0]}
    return Peer(1, **(found | {"probe": page.probe.data_ptr()} | wrong))


def test_a_peer_sees_what_is_written_and_cannot_write() -> None:
    page, buffer = ControlPage(SIZE), torch.arange(1000.0)
    page.counters[5] = -7
    peer = peer_of(page)
    out = torch.zeros(990)
    peer.read(buffer[10:].data_ptr(), out)
    assert torch.equal(out, buffer[10:]) and peer.counters[5] == -7
    peer.read(0, torch.empty(0))
    with pytest.raises(TypeError):
        peer.counters[5] = 1


def test_what_comes_in_pieces_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system moves at most 2 GB in one call."""
    page, buffer, out = ControlPage(SIZE), torch.arange(10_000.0), torch.zeros(10_000)
    peer, calls = peer_of(page), []

    class Slow:
        @staticmethod
        def process_vm_readv(pid, here, n, there, m, flags):  # type: ignore[no-untyped-def]
            for each in (here, there):
                size = min(each._obj.size, 12_345)
                calls.append(size)
                each._obj.__class__(each._obj.base, size)
            small = [page_module._Range(each._obj.base, size) for each in (here, there)]
            return real.process_vm_readv(pid, ctypes.byref(small[0]), n, ctypes.byref(small[1]), m, flags)

    real = page_module._libc
    monkeypatch.setattr(page_module, "_libc", Slow)
    peer.read(buffer.data_ptr(), out)
    assert torch.equal(out, buffer) and len(calls) == 8


@pytest.mark.parametrize("wrong", ["token", "fd", "pid", "probe"])
def test_the_wrong_page_is_noticed(wrong: str) -> None:
    page, other = ControlPage(SIZE), ControlPage(SIZE)
    mistake = {"token": page.counters[0] + 1, "fd": other.fd, "pid": 2**22 + 1, "probe": other.probe.data_ptr()}
    with pytest.raises((OSError, ValueError)):
        peer_of(page, **{wrong: mistake[wrong]})


def test_an_address_where_nothing_lies_is_an_error_with_a_name() -> None:
    page = ControlPage(SIZE)
    with pytest.raises(OSError, match=rf"memory of rank 1 \(process {os.getpid()}\) at 0x10"):
        peer_of(page).read(16, torch.zeros(4))


def test_a_page_that_is_closed_is_gone_for_peers() -> None:
    page = ControlPage(SIZE)
    peer, buffer, out = peer_of(page), torch.ones(8), torch.zeros(8)
    assert peer.is_alive()
    page.close()
    assert not peer.is_alive()
    peer.read(buffer.data_ptr(), out)
    assert bool((out == 1).all()), "what was announced before can be read"
    with pytest.raises(LostRankError, match="closed its engine"):
        peer.read(16, out)


def test_nobody_else_reads_a_page_and_nobody_shrinks_it() -> None:
    """Reading behind the end of a file that was shrunk is SIGBUS, which ends the process without a word."""
    page = ControlPage(SIZE)
    peer = peer_of(page)
    assert os.fstat(page.fd).st_mode & 0o777 == 0o600
    opened = os.open(f"/proc/{os.getpid()}/fd/{page.fd}", os.O_RDWR)  # as any process of the user can
    try:
        for size in (0, 8, page.size - 1, page.size + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(opened, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(opened, fcntl.F_ADD_SEALS, 0)
    finally:
        os.close(opened)
    page.counters[5] = 3
    assert peer.counters[5] == 3


OTHER = f"""
import time, torch
from shardline.comm.control_page import ControlPage
page, buffer = ControlPage({SIZE}), torch.full((8,), 5.0)
print(page.fd, page.counters[0], page.probe.data_ptr(), buffer.data_ptr(), flush=True)
time.sleep(60)
"""


def with_a_process(look: Callable[[subprocess.Popen[str], Peer, int], None]) -> None:
    process = subprocess.Popen([sys.executable, "-c", OTHER], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        fd, token, probe, place = map(int, process.stdout.readline().split())
        look(process, Peer(1, process.pid, fd, SIZE, token, probe), place)
    finally:
        process.kill()
        process.communicate()


def test_a_process_that_was_killed_is_gone_and_its_counters_stay_readable() -> None:
    def look(process: subprocess.Popen[str], peer: Peer, place: int) -> None:
        out, token = torch.zeros(8), peer.counters[0]
        peer.read(place, out)
        assert peer.is_alive() and bool((out == 5).all())
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead and not reaped: a pid that kill(pid, 0) finds
        os.kill(process.pid, 0)
        assert not peer.is_alive() and peer.counters[0] == token
        with pytest.raises(LostRankError, match=rf"rank 1 \(process {process.pid}\) ended"):
            peer.read(place, out)

    with_a_process(look)


def test_a_posted_text_is_read_and_taken_back() -> None:
    page = ControlPage(SIZE)
    peer = peer_of(page, size=page.size)
    assert peer.posted() == ""
    counters = list(page.counters[: SIZE // 8])
    for text in ("short", "é" * 300, "x" * 9000 + "the end", "again", ""):
        page.post(text)
        assert peer.posted() == text[-4088:]
    assert list(page.counters[: SIZE // 8]) == counters, "the text lies beside the counters"
