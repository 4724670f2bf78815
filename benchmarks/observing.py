"""What sinks cost: steps of one model with all of them and with none, in turns within one process.

    python benchmarks/observing.py [--rounds 30] [--steps 5] [--width 512]

Two engines take turns of a few steps. What is quoted is the median over the rounds of the ratio of two turns that
follow each other, and the time that the sinks take by themselves. Sinks are those whose packages are there: the run
log, CSV files, TensorBoard, phases, transfers, the step line.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import nn

import shardline
from shardline.events import Event


def make(width: int, sinks: dict[str, Any]) -> shardline.Engine:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(4)]
    config = {"train_micro_batch_size_per_gpu": 64, "optimizer": {"type": "AdamW"}, **sinks}
    engine, *_ = shardline.initialize(model=nn.Sequential(*layers), config=config)
    return engine


def turn(engine: shardline.Engine, batch: torch.Tensor, steps: int) -> float:
    begin = time.perf_counter()
    for _ in range(steps):
        engine.backward(engine(batch).square().mean())
        engine.step()
    return (time.perf_counter() - begin) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--width", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("shardline").addHandler(logging.NullHandler())
    logging.getLogger("shardline").propagate = False
    folder = tempfile.mkdtemp()
    sinks: dict[str, Any] = {
        "run_log": {"dir": folder},
        "csv_monitor": {"enabled": True, "output_path": folder},
        "comms_logger": {},
        "wall_clock_breakdown": True,
        "steps_per_print": 1,
    }
    if find_spec("tensorboard"):
        sinks["tensorboard"] = {"enabled": True, "output_path": folder, "job_name": "events"}
    engines = [make(args.width, {}), make(args.width, sinks)]
    told: list[float] = []
    emit = engines[1].events.emit

    def timed(event: Event) -> None:
        begin = time.perf_counter()
        emit(event)
        told.append(time.perf_counter() - begin)

    engines[1].events.emit = timed  # type: ignore[method-assign]
    batch = torch.randn(64, args.width)
    for engine in engines:
        turn(engine, batch, 5)
    told.clear()
    rounds = []
    for number in range(args.rounds):
        order = (0, 1) if number % 2 else (1, 0)  # whoever goes second may find the caches as the first left them
        seconds = {each: turn(engines[each], batch, args.steps) for each in order}
        rounds.append((seconds[0], seconds[1]))
    plain, ratio = median(a for a, _ in rounds), median(b / a for a, b in rounds)
    steps = args.rounds * args.steps
    pairs = [sum(told[place : place + 2]) for place in range(0, len(told), 2)]  # of the events of a step
    print(f"sinks: {', '.join(sinks)}")
    print(f"a step {1e3 * plain:.1f} ms, with sinks x {ratio:.4f}")
    print(f"{len(told) / steps:.1f} events a step, which all sinks together take {1e6 * median(pairs):.0f} us to keep")
    for engine in engines:
        engine.destroy()


if __name__ == "__main__":
    main()
