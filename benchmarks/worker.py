"""The processes of one engine: they take turns with other engines' and sleep in between, waiting for an order.

Processes are forked from one server that has imported everything, so that none pays for imports. A pair is one engine
with one model on all ranks; its controller tells it to do some steps, and it answers with what it measured.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import time
import traceback
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import measure
import torch
import torch.distributed as dist
from loops import ENGINES, Step, Work, hand
from models import MODELS, Batch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRELOAD = ["worker", "torch.distributed.fsdp", "torch.distributed.optim", "shardline.engine.initialize"]
"""Imported once, in the server that the processes are forked from.

These are also the modules that the engines import when they are first used (DeepSpeed: 50 MB of them): no engine's
imports count as memory or as time of set-up.
"""
if importlib.util.find_spec("deepspeed"):
    PRELOAD += ["deepspeed", "deepspeed.module_inject", "torch._inductor.compile_fx", "torch.utils.cpp_extension"]
LIMIT = 300.0
"""Seconds after which an order that is not answered counts as a hang."""


class Failed(Exception):
    """An engine did not do what it was told; the message is its traceback."""


class Pair:
    """An engine at work on ``world`` processes, seen from the controller."""

    def __init__(self, engine: str, model: str, dtype: str, accumulation: int, world: int) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._ends: list[Connection] = []
        self._processes = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(world):
            ours, theirs = context.Pipe()
            order = (theirs, rank, world, port, engine, model, dtype, accumulation)
            process = context.Process(target=serve, args=order, daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)
        self.start = self._answers()

    def run(self, steps: int) -> list[dict[str, Any]]:
        """Do ``steps`` optimizer steps; what each rank measured."""
        for end in self._ends:
            end.send(steps)
        return self._answers()

    def _answers(self) -> list[dict[str, Any]]:
        answers: dict[Connection, dict[str, Any]] = {}
        deadline = time.monotonic() + LIMIT
        while len(answers) < len(self._ends):
            ready = wait([end for end in self._ends if end not in answers], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise Failed(f"no answer for {LIMIT:.0f} seconds")
            for end in ready:
                try:
                    answer = end.recv()  # type: ignore[union-attr]
                except EOFError:
                    answer = "a process ended without a word"
                if isinstance(answer, str):
                    self.close()
                    raise Failed(answer)
                answers[end] = answer  # type: ignore[index]
        return [answers[end] for end in self._ends]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for end in self._ends:
            end.close()


def serve(conn: Connection, rank: int, world: int, port: int, *order: Any) -> None:
    """One rank: set up, then answer orders until the controller hangs up."""
    if not os.environ.get("BENCH_VERBOSE"):
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
    launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in launcher.items()} | {"MASTER_ADDR": "127.0.0.1"}
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        bench = Rank(rank, *order)
        conn.send(bench.start)
        while True:
            conn.send(bench.run(conn.recv()))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass
    except BaseException:
        conn.send(traceback.format_exc())
    sys.stdout.flush()
    os._exit(0)


class Rank:
    """One rank of one engine: times its steps and reads its memory."""

    def __init__(self, rank: int, engine: str, model: str, dtype: str, accumulation: int) -> None:
        spec, self._engine = MODELS[model], ENGINES[engine]
        work = Work(DTYPES[dtype], accumulation, spec.samples, spec.unit_min_numel)
        self._batches = spec.data(rank, work.dtype)
        self._accumulation, self._taken = accumulation, 0
        _warm_up(work.dtype)
        self._base = measure.resident()
        measure.touch_free_memory()
        measure.restart_peak()

        net = spec.fresh()
        self._parameters = sum(param.numel() for param in net.parameters())
        dist.barrier()
        began = time.perf_counter()
        self._step: Step = self._engine.make(net, work)
        setup = time.perf_counter() - began
        first = self.run(1)
        self.start = {
            "parameters": self._parameters,
            "setup": setup,
            "first": first["seconds"][0],
            "losses": first["losses"],
            "peak": max(first["peak"], first["peak before"]),
        }

    def run(self, steps: int) -> dict[str, Any]:
        """``steps`` optimizer steps, beginning together on all ranks."""
        seconds, losses = [], []
        before = self._above(measure.peak())
        dist.barrier()
        measure.restart_peak()
        for _ in range(steps):
            batches = self._next()
            began = time.perf_counter()
            loss = self._step(batches)
            seconds.append(time.perf_counter() - began)
            losses.append(loss)
        return {
            "seconds": seconds,
            "losses": [loss.item() for loss in losses],
            "peak": self._above(measure.peak()),
            "peak before": before,
            "steady": self._above(measure.resident()),
        }

    def _next(self) -> list[Batch]:
        taken = [self._batches[(self._taken + n) % len(self._batches)] for n in range(self._accumulation)]
        self._taken += self._accumulation
        return taken

    def _above(self, size: float) -> float:
        return size - self._base


def _warm_up(dtype: torch.dtype) -> None:
    """Touch what every process has in the end: kernels of both kinds of models, the optimizer, gloo's threads."""
    for name in ("tiny", "tiny-conv"):
        spec = MODELS[name]
        step = hand(spec.fresh(), Work(dtype))
        for batch in spec.data(0, dtype)[:2]:
            step([batch])
    dist.all_reduce(torch.zeros(1000))
    dist.barrier()
