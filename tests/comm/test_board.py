"""The board that other processes map, and the memory that they read: right, refused, or gone, and never torn away."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from shardline.comm import board as board_module
from shardline.comm.board import Board, Peer
from shardline.errors import LostRankError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd_create")

SIZE = 2 * mmap.PAGESIZE


def peer_of(board: Board, **wrong: int) -> Peer:
    found = {"pid": os.getpid(), "fd": board.fd, "size": SIZE, "token": board.words[0]}
    return Peer(1, **(found | {"probe": board.probe.data_ptr()} | wrong))


def test_a_peer_sees_what_is_written_and_cannot_write() -> None:
    board, buffer = Board(SIZE), torch.arange(1000.0)
    board.words[5] = -7
    peer = peer_of(board)
    out = torch.zeros(990)
    peer.read(buffer[10:].data_ptr(), out)
    assert torch.equal(out, buffer[10:]) and peer.words[5] == -7
    peer.read(0, torch.empty(0))
    with pytest.raises(TypeError):
        peer.words[5] = 1


def test_what_comes_in_pieces_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system moves at most 2 GB in one call."""
    board, buffer, out = Board(SIZE), torch.arange(10_000.0), torch.zeros(10_000)
    peer, calls = peer_of(board), []

    class Slow:
        @staticmethod
        def process_vm_readv(pid, here, n, there, m, flags):  # type: ignore[no-untyped-def]
            for each in (here, there):
                size = min(each._obj.size, 12_345)
                calls.append(size)
                each._obj.__class__(each._obj.base, size)
            small = [board_module._Range(each._obj.base, size) for each in (here, there)]
            return real.process_vm_readv(pid, ctypes.byref(small[0]), n, ctypes.byref(small[1]), m, flags)

    real = board_module._libc
    monkeypatch.setattr(board_module, "_libc", Slow)
    peer.read(buffer.data_ptr(), out)
    assert torch.equal(out, buffer) and len(calls) == 8


@pytest.mark.parametrize("wrong", ["token", "fd", "pid", "probe"])
def test_the_wrong_board_is_noticed(wrong: str) -> None:
    board, other = Board(SIZE), Board(SIZE)
    mistake = {"token": board.words[0] + 1, "fd": other.fd, "pid": 2**22 + 1, "probe": other.probe.data_ptr()}
    with pytest.raises((OSError, ValueError)):
        peer_of(board, **{wrong: mistake[wrong]})


def test_an_address_where_nothing_lies_is_an_error_with_a_name() -> None:
    board = Board(SIZE)
    with pytest.raises(OSError, match=rf"memory of rank 1 \(process {os.getpid()}\) at 0x10"):
        peer_of(board).read(16, torch.zeros(4))


def test_a_board_that_is_closed_is_gone_for_others() -> None:
    board = Board(SIZE)
    peer, buffer, out = peer_of(board), torch.ones(8), torch.zeros(8)
    assert peer.is_there()
    board.close()
    assert not peer.is_there()
    peer.read(buffer.data_ptr(), out)
    assert bool((out == 1).all()), "what was announced before can be read"
    with pytest.raises(LostRankError, match="closed its engine"):
        peer.read(16, out)


OTHER = f"""
import time, torch
from shardline.comm.board import Board
board, buffer = Board({SIZE}), torch.full((8,), 5.0)
print(board.fd, board.words[0], board.probe.data_ptr(), buffer.data_ptr(), flush=True)
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


def test_a_process_that_was_killed_is_gone_and_its_words_are_not_torn_away() -> None:
    def look(process: subprocess.Popen[str], peer: Peer, place: int) -> None:
        out, words = torch.zeros(8), peer.words[0]
        peer.read(place, out)
        assert peer.is_there() and bool((out == 5).all())
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead and not reaped: a pid that kill(pid, 0) finds
        os.kill(process.pid, 0)
        assert not peer.is_there() and peer.words[0] == words
        with pytest.raises(LostRankError, match=rf"rank 1 \(process {process.pid}\) ended"):
            peer.read(place, out)

    with_a_process(look)


def test_what_a_rank_says_is_read_and_taken_back() -> None:
    board = Board(SIZE)
    peer = peer_of(board, size=board.size)
    assert peer.said() == ""
    words = list(board.words[: SIZE // 8])
    for text in ("short", "é" * 300, "x" * 9000 + "the end", "again", ""):
        board.say(text)
        assert peer.said() == text[-4088:]
    assert list(board.words[: SIZE // 8]) == words, "the words that say what was announced are others"
