"""Real processes that save small tensors, without engines: made by fork, each costs milliseconds and no import."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from shardline.checkpoint.format.commit import commit
from shardline.checkpoint.format.content import Body, Content, parameter_entry
from shardline.checkpoint.format.directory import Directory, check_files
from shardline.checkpoint.format.faults import armed
from shardline.checkpoint.format.manifest import read_manifest
from shardline.checkpoint.format.reader import CheckpointReader

SIZE = 64


class Ring:
    """JSON values between forked processes over sockets through rank 0: what a process group does, in milliseconds.

    A peer that died ends the exchange on the others, as gloo does.
    """

    def __init__(self, rank: int, pairs: Sequence[tuple[socket.socket, socket.socket]]) -> None:
        self.rank, self.world_size = rank, len(pairs) + 1
        self._peers = [ours for ours, _ in pairs] if rank == 0 else [pairs[rank - 1][1]]
        for number, (ours, theirs) in enumerate(pairs):
            if rank == 0:
                theirs.close()
            else:
                ours.close()
                if number != rank - 1:
                    theirs.close()
        self._files = [peer.makefile("rw") for peer in self._peers]

    def exchange(self, value: Any) -> list[Any]:
        import json

        if self.rank == 0:
            values = [value, *(json.loads(_line(file)) for file in self._files)]
            for file in self._files:
                file.write(json.dumps(values) + "\n")
                file.flush()
            return json.loads(json.dumps(values))
        self._files[0].write(json.dumps(value) + "\n")
        self._files[0].flush()
        return json.loads(_line(self._files[0]))


def _line(file: Any) -> str:
    line = file.readline()
    if not line:
        raise RuntimeError("Connection closed by peer")
    return line


def spawn(world: int, body: Callable[[Ring], None], seconds: float = 100.0) -> list[int]:
    """Run ``body`` on every rank of a forked world; returns exit codes, -9 for one that was killed."""
    pairs = [socket.socketpair() for _ in range(world - 1)]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                body(Ring(rank, pairs))
                code = 0
            except BaseException:
                if os.environ.get("SHOW"):
                    traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    for pair in pairs:
        for end in pair:
            end.close()
    codes, give_up = [], time.monotonic() + seconds
    for child in children:
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes.append(os.waitstatus_to_exitcode(status))
                break
            if time.monotonic() > give_up:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.001)
    return codes


def content(ring: Ring, step: int) -> Content:
    """Each rank holds a half of one parameter, whose elements are all ``step``."""
    value = torch.full((SIZE,), float(step))
    start = ring.rank * SIZE

    def body(reports: list[Any]) -> Body:
        pieces = [[file, low, low + SIZE] for file, low in enumerate(reports)]
        entry = parameter_entry([SIZE * ring.world_size], "float32", group=0)
        entry["weight"]["pieces"] = pieces
        counters = dict.fromkeys(("global_samples", "skipped_steps", "average_updates"), 0)
        counters |= {"global_steps": step, "micro_steps": step}
        return Body(world_size=ring.world_size, counters=counters, parameters={"w": entry})

    return Content({"weight/w": value}, start, body)


def save(ring: Ring, path: Path, tag: str, step: int, fault: str | None = None, **options: Any) -> None:
    commit(path, tag, content(ring, step), ring, armed(ring.rank, fault), **options)


def save_in_background(ring: Ring, path: Path, tag: str, step: int, fault: str) -> None:
    """The same in a thread, while this one writes to other files, as training does."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            save(ring, path, tag, step, fault)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive():
        sum(range(1000))
    if errors:
        raise errors[0]


def newest(path: Path) -> tuple[str, int] | None:
    """The tag that a load would take, and the step in its every element."""
    directory = Directory(path)
    for tag in directory.order():
        where = directory.locate(tag)
        assert where is not None, f"{tag} is nowhere"
        manifest = read_manifest(where)
        assert not check_files(where, manifest, range(len(manifest.files)))
        reader = CheckpointReader(where, manifest)
        values = reader.full("w").unique().tolist()
        reader.close()
        assert values == [manifest.counters.global_steps]
        return tag, int(values[0])
    return None
