"""Ranks that may die, hang or be stopped: processes of their own, forked from one that has imported torch.

A rank runs a function of a test module as if it were a script: what it raises is uncaught, and the interpreter ends as
it always does. Nothing of it is a child of the test's process, and whatever still lives at the limit is killed.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.sockets import free_port

LIMIT = 80.0  # seconds of one run; usual are 1 to 3


@dataclass
class Ended:
    """How the ranks of one run ended."""

    codes: list[int]
    """Exit codes; -n after signal n; -9 also where the limit was reached, which ``late`` tells."""
    said: list[str]
    """What each wrote to stdout and stderr."""
    late: list[int]
    """Ranks that were still there at the limit."""
    pids: list[int]


class Processes:
    """Starts ranks; see :meth:`run`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._runs = folder, 0
        self._server = subprocess.Popen(
            [sys.executable, "-c", "from tests.watch.processes import serve; serve()()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,
        )

    def run(
        self, function: Callable[..., object], world: int, *args: Any, limit: float = LIMIT, spare: Sequence[int] = ()
    ) -> Ended:
        """Run ``function(*args)``, at the top level of its module, on ``world`` ranks.

        Args:
            limit: seconds after which ranks are killed.
            spare: ranks that are killed as soon as all others have ended: those that hang on purpose.
        """
        self._runs += 1
        folder = self._folder / f"run{self._runs}"
        folder.mkdir()
        order = {
            "module": function.__module__,
            "name": function.__name__,
            "args": args,
            "world": world,
            "folder": str(folder),
            "limit": limit,
            "spare": list(spare),
        }
        stdin, stdout = self._server.stdin, self._server.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(order).encode() + b"\n")
        stdin.flush()
        ready, _, _ = select.select([stdout], [], [], limit + 30)
        assert ready, "the process that starts ranks does not answer"
        found = json.loads(stdout.readline())
        said = [(folder / f"rank{rank}.txt").read_text() for rank in range(world)]
        return Ended(found["codes"], said, found["late"], found["pids"])

    def close(self) -> None:
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.communicate()


def serve() -> Callable[[], object]:
    """Fork ranks as told, until told no more. In a rank it returns what the rank shall run."""
    import torch
    import torch._dynamo  # noqa: F401

    import shardline

    for name in ("initialize", "Engine"):
        getattr(shardline, name)
    gc.freeze()  # no collection in a rank, such as those at its end, looks at what it shares with others
    for line in sys.stdin.buffer:
        order = json.loads(line)
        module = import_module(order["module"])
        port = free_port()
        ranks: dict[int, int] = {}
        begin = time.monotonic()
        for rank in range(order["world"]):
            pid = os.fork()
            if pid == 0:
                return _rank(order, module, rank, port)
            ranks[rank] = pid
        codes, late = _collect(ranks, begin + order["limit"], order["spare"])
        sys.stdout.write(json.dumps({"codes": codes, "late": late, "pids": list(ranks.values())}) + "\n")
        sys.stdout.flush()
    return lambda: None


def _rank(order: dict[str, Any], module: Any, rank: int, port: int) -> Callable[[], object]:
    world = str(order["world"])
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=world,
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=world,
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    out = os.open(f"{order['folder']}/rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for theirs, ours in ((null, 0), (out, 1), (out, 2)):
        os.dup2(theirs, ours)
    return lambda: getattr(module, order["name"])(*order["args"])


def _collect(ranks: dict[int, int], deadline: float, spare: Sequence[int]) -> tuple[list[int], list[int]]:
    codes: dict[int, int] = {}
    late: list[int] = []
    while len(codes) < len(ranks):
        for rank, pid in ranks.items():
            if rank not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        left = [rank for rank in ranks if rank not in codes]
        over = time.monotonic() > deadline
        if over or (left and set(left) <= set(spare)):
            late = left if over else []
            for rank in left:
                os.kill(ranks[rank], signal.SIGKILL)
            for rank in left:
                codes[rank] = os.waitstatus_to_exitcode(os.waitpid(ranks[rank], 0)[1])
        time.sleep(0.01)
    return [codes[rank] for rank in sorted(codes)], late
