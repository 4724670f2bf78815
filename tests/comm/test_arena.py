"""Memory that another process maps: pages come and go with buffers, and nothing outlives its processes."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from shardline.comm.arena import Arena, Peer, in_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd_create")

PAGE = in_pages(1)
HEADER = 2 * PAGE


def pages(arena: Arena) -> int:
    """Pages that the file has."""
    return os.fstat(arena.fd).st_blocks * 512 // PAGE


def peer_of(arena: Arena, **wrong: int) -> Peer:
    found = {"pid": os.getpid(), "fd": arena.fd, "size": arena.size, "header": HEADER, "token": arena.token}
    return Peer(1, **(found | wrong))


def test_a_peer_sees_what_is_written_and_where() -> None:
    arena = Arena(64 * PAGE, HEADER)
    buffer = arena.empty(1000, torch.float32).copy_(torch.arange(1000.0))
    arena.words[5] = -7
    peer = peer_of(arena)
    place = arena.place(buffer[10:])
    assert place is not None and place >= HEADER
    assert torch.equal(peer.read(place, 990, torch.float32), torch.arange(10.0, 1000.0))
    assert peer.words[5] == -7
    with pytest.raises(TypeError):
        peer.words[5] = 1
    assert arena.place(torch.zeros(5)) is None


def test_buffers_never_overlap_and_their_pages_go_with_them() -> None:
    arena = Arena(64 * PAGE, HEADER)
    empty = pages(arena)
    buffers = {size: arena.empty(size, torch.uint8).fill_(size % 251) for size in (PAGE, 3 * PAGE, 5 * PAGE - 1, 1)}
    assert all(bool((buffer == size % 251).all()) for size, buffer in buffers.items())
    assert pages(arena) == empty + 10
    view = buffers[3 * PAGE][7:]
    del buffers[3 * PAGE], buffers[1]
    assert pages(arena) == empty + 9, "a view keeps the whole"
    del view
    assert pages(arena) == empty + 6
    buffers.clear()
    whole = arena.empty(62 * PAGE, torch.uint8)  # what was cut is one again
    assert pages(arena) == empty + 62
    with pytest.raises(OSError, match="space"):
        arena.empty(1, torch.uint8)
    assert whole.numel() == 62 * PAGE


def test_what_somebody_may_be_reading_keeps_its_pages() -> None:
    arena = Arena(64 * PAGE, HEADER)
    peer = peer_of(arena)
    buffer = arena.empty(PAGE, torch.uint8).fill_(9)
    place = arena.place(buffer)
    arena.is_quiet = lambda: False
    del buffer
    other = arena.empty(PAGE, torch.uint8).fill_(1)
    assert bool((peer.read(place, PAGE, torch.uint8) == 9).all())
    before = pages(arena)
    arena.is_quiet = lambda: True
    third = arena.empty(PAGE, torch.uint8)
    assert pages(arena) == before and arena.place(third) == place
    assert bool((other == 1).all())


def test_a_buffer_made_in_inference_mode_is_an_ordinary_one() -> None:
    arena = Arena(64 * PAGE, HEADER)
    with torch.inference_mode():
        buffer = arena.empty(8, torch.float32)
    buffer.fill_(1.0).requires_grad_(True).sum().backward()
    assert not buffer.is_inference()


def test_a_forked_child_takes_nothing_away() -> None:
    arena = Arena(64 * PAGE, HEADER)
    buffer, kept = arena.empty(PAGE, torch.uint8).fill_(3), arena.empty(PAGE, torch.uint8).fill_(4)
    child = os.fork()
    if not child:
        del buffer, kept
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert bool((buffer == 3).all()) and bool((kept == 4).all())


@pytest.mark.parametrize("wrong", ["token", "fd", "pid"])
def test_the_wrong_memory_is_noticed(wrong: str) -> None:
    arena, other = Arena(64 * PAGE, HEADER), Arena(64 * PAGE, HEADER)
    mistake = {"token": arena.token + 1, "fd": other.fd, "pid": 2**22 + 1}
    with pytest.raises((OSError, ValueError)):
        peer_of(arena, **{wrong: mistake[wrong]})


def test_an_arena_that_is_closed_is_gone_for_others_and_good_to_who_holds_it() -> None:
    arena = Arena(64 * PAGE, HEADER)
    peer, buffer = peer_of(arena), arena.empty(8, torch.float32).fill_(2.0)
    assert peer.is_there()
    arena.close()
    assert not peer.is_there() and bool((buffer == 2).all())
    assert torch.equal(peer.read(arena.place(buffer), 8, torch.float32), buffer)


OTHER = f"""
import sys, time, torch
from shardline.comm.arena import Arena
arena = Arena(64 * {PAGE}, {HEADER})
buffer = arena.empty(8, torch.float32).fill_(5.0)
print(arena.fd, arena.token, arena.place(buffer), flush=True)
time.sleep(60)
"""


def with_a_process(look: Callable[[subprocess.Popen[str], Peer, int], None]) -> None:
    process = subprocess.Popen([sys.executable, "-c", OTHER], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        fd, token, place = map(int, process.stdout.readline().split())
        look(process, Peer(1, process.pid, fd, 64 * PAGE, HEADER, token), place)
    finally:
        process.kill()
        process.communicate()


def test_a_process_that_was_killed_is_gone_and_its_memory_is_not_torn_away() -> None:
    def look(process: subprocess.Popen[str], peer: Peer, place: int) -> None:
        assert peer.is_there() and bool((peer.read(place, 8, torch.float32) == 5).all())
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead and not reaped: a pid that kill(pid, 0) finds
        os.kill(process.pid, 0)
        assert not peer.is_there()
        assert bool((peer.read(place, 8, torch.float32) == 5).all())

    with_a_process(look)
