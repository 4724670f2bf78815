"""What it costs to be looked at: steps of one model with every sink and with none, in turns within one process.

    python benchmarks/observing.py [--rounds 60] [--steps 4] [--width 512] [--write [FILE]]

Three engines train the same model: one without sinks, a second one without, and one with all sinks whose packages are
there. In each round each of them takes a turn of a few steps, in an order that changes from round to round. A figure
is the median over the rounds of the ratio of two turns of one round; the two engines without sinks tell how much of it
is noise. The first step of a turn is not counted: it warms caches up, and a thread that still writes what the last turn
left takes its time from the engine that left it. The processor time counts all threads of the process, the wall clock
also what else the machine does. What the sinks take by themselves is counted, too: processor time within the calls by
which they get events, and of threads other than the one that trains. `--write` puts the table between the markers of
docs/performance.md.

One process of one thread on the CPU. Other ranks than 0 have no sinks, and wait for rank 0 if it is slower.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

os.environ["SHARDLINE_DEVICE"] = "cpu"

import torch
from measure import machine
from torch import nn

import shardline
from shardline.events import Event
from shardline.observe import Sink

REPORT = Path(__file__).parents[1] / "docs" / "performance.md"
MARKERS = re.compile(r"(<!-- figures: python benchmarks/observing.py --write -->\n).*?(<!-- /figures -->)", re.DOTALL)
ENGINES = ("without", "again", "with")
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}
KINDS = {
    "console": ("console", "Console"),
    "run_log": ("jsonl", "JsonLines"),
    "csv_monitor": ("csv_files", "CsvFiles"),
    "tensorboard": ("tensorboard", "TensorBoard"),
    "wandb": ("wandb", "WeightsAndBiases"),
    "mlflow": ("mlflow", "MLflow"),
}
"""Module and class of each sink, by section."""


class Seconds(NamedTuple):
    """Of one step: of the clock, of the processor, and of the processor in other threads than the one that trains."""

    wall: float
    processor: float
    beside: float


def sinks(folder: str) -> dict[str, Any]:
    """The sections of the configuration that turn everything on for which there is a package."""
    os.environ |= {
        "WANDB_MODE": "offline",
        "WANDB_DIR": folder,
        "WANDB_SILENT": "true",
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }
    trackers = {
        "tensorboard": {"enabled": True, "output_path": folder, "job_name": "events"},
        "wandb": {"enabled": True},
        "mlflow": {"enabled": True, "tracking_uri": f"{folder}/mlflow"},
    }
    return {
        "run_log": {"dir": folder},
        "csv_monitor": {"enabled": True, "output_path": folder},
        "comms_logger": {"verbose": True},
        "flops_profiler": {"enabled": True, "detailed": False, "peak_tflops": 1.0},
        "wall_clock_breakdown": True,
        "steps_per_print": 1,
        **{name: section for name, section in trackers.items() if find_spec(name)},
    }


def make(width: int, sections: dict[str, Any]) -> shardline.Engine:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(4)]
    config = {"train_micro_batch_size_per_gpu": 64, "optimizer": {"type": "AdamW"}, **sections}
    engine, *_ = shardline.initialize(model=nn.Sequential(*layers), config=config)
    return engine


def turn(engine: shardline.Engine, batch: torch.Tensor, steps: int) -> Seconds:
    """One step that is not counted, and ``steps`` that are."""

    def step() -> None:
        engine.backward(engine(batch).square().mean())
        engine.step()

    step()
    wall, processor, thread = time.perf_counter(), time.process_time(), time.thread_time()
    for _ in range(steps):
        step()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return Seconds(wall / steps, processor / steps, (processor - time.thread_time() + thread) / steps)


class Spread(NamedTuple):
    """Of ratios: their median, where it lies in 95 of 100 such measurements, and their middle half."""

    median: float
    between: tuple[float, float]
    half: tuple[float, float]

    @classmethod
    def of(cls, ratios: Iterable[float]) -> Spread:
        """The interval is that of the order statistics around the median, whatever the noise is like."""
        found = sorted(ratios)
        reach = 0.98 * math.sqrt(len(found))
        low, high = math.floor(len(found) / 2 - reach), math.ceil(len(found) / 2 + reach)
        first, _, third = quantiles(found, n=4)
        return cls(median(found), (found[max(0, low)], found[min(len(found) - 1, high)]), (first, third))

    def cells(self) -> str:
        low, high = self.between
        return f"{self.median:.4f} ({low:.4f} to {high:.4f}) | {self.half[0]:.3f} to {self.half[1]:.3f}"


class Listening:
    """Counts the events of an engine, and the processor's nanoseconds in which each kind of sink takes them."""

    def __init__(self, engine: shardline.Engine) -> None:
        self.events = 0
        self.nanoseconds: Counter[str] = Counter()
        engine.events.subscribe(self._count)

    def _count(self, event: Event) -> None:
        self.events += 1

    def watch(self, kind: type[Sink], name: str) -> None:
        """Count the time of ``kind`` to ``name``, also of a sink that is open already."""
        receive = kind.receive

        def timed(sink: Sink, event: Event) -> None:
            begin = time.thread_time_ns()
            receive(sink, event)
            self.nanoseconds[name] += time.thread_time_ns() - begin

        kind.receive = timed  # type: ignore[method-assign]


def writes() -> int:
    """Calls of the system by which this process has written."""
    text = Path("/proc/self/io").read_text(encoding="ascii")
    return int(text.partition("syscw:")[2].split()[0])


class Measured(NamedTuple):
    """What was measured; counts are of one step."""

    steps: int
    rounds: list[dict[str, Seconds]]
    sections: dict[str, Any]
    events: float
    writes: float
    nanoseconds: dict[str, float]

    def ratio(self, name: str, clock: str) -> str:
        found = (getattr(one[name], clock) / getattr(one["without"], clock) for one in self.rounds)
        return Spread.of(found).cells()

    def lines(self) -> list[str]:
        """As Markdown."""
        plain = median(one["without"].processor for one in self.rounds)
        taken = sum(self.nanoseconds.values())
        about = machine()
        packages = [f"Python {about['python']}", f"torch {about['torch']}"]
        packages += [f"{name} {version(PACKAGES[name])}" for name in PACKAGES if name in self.sections]
        rows = [
            ("all sinks, wall clock", self.ratio("with", "wall")),
            ("all sinks, processor time", self.ratio("with", "processor")),
            ("none again, wall clock", self.ratio("again", "wall")),
            ("none again, processor time", self.ratio("again", "processor")),
        ]
        return [
            f"| step / step without sinks, {len(self.rounds)} rounds of {self.steps} steps | median (95 % interval) | "
            "middle half |",
            "|---|---|---|",
            *(f"| {name} | {cells} |" for name, cells in rows),
            "",
            "| counted for one step | |",
            "|---|---|",
            f"| events, writes to the system | {self.events:.1f}, {self.writes:.1f} |",
            *(f"| {name}, ns of the processor | {value:,.0f} |" for name, value in self.nanoseconds.items()),
            f"| together, of a step of {1e3 * plain:.1f} ms without sinks | {taken / 1e9 / plain:.2%} |",
            "",
            f"{datetime.now(UTC):%Y-%m-%d}, {about['cpu']}, load before {about['load before']},",
            f"{', '.join(packages)}. Sections:",
            f"{', '.join(self.sections)}.",
        ]


def measure(rounds: int, steps: int, width: int, folder: str) -> Measured:
    """Let the engines take turns."""
    sections = sinks(folder)
    engines = dict(zip(ENGINES, (make(width, {}), make(width, {}), make(width, sections)), strict=True))
    batch = torch.randn(64, width)
    for engine in engines.values():
        turn(engine, batch, 5)
    listening = Listening(engines["with"])
    for name, kind in KINDS.items():
        if name == "console" or name in sections:
            listening.watch(getattr(import_module(f"shardline.observe.{kind[0]}"), kind[1]), name)
    orders = itertools.cycle(itertools.permutations(ENGINES))
    found: list[dict[str, Seconds]] = []
    written = 0
    for _, order in zip(range(rounds), orders, strict=False):
        one = {}
        for name in order:
            before = writes()
            one[name] = turn(engines[name], batch, steps)
            written += writes() - before if name == "with" else 0
        found.append(one)
    count = rounds * (steps + 1)
    nanoseconds = {name: taken / count for name, taken in listening.nanoseconds.items()}
    beside = 1e9 * sum(one["with"].beside - one["without"].beside for one in found) / rounds
    nanoseconds["threads of sinks"] = max(0.0, beside)
    for engine in engines.values():
        engine.destroy()
    return Measured(steps, found, sections, listening.events / count, written / count, nanoseconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--write", type=Path, nargs="?", const=REPORT, help=f"put the table into FILE ({REPORT.name})")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        handler = logging.FileHandler(f"{folder}/log")
        logging.getLogger("shardline").addHandler(handler)
        logging.getLogger("shardline").propagate = False
        lines = measure(args.rounds, args.steps, args.width, folder).lines()
        handler.close()
    block = "\n".join(lines) + "\n"
    print(block, end="")
    if args.write is not None:
        text = args.write.read_text(encoding="utf-8")
        if not MARKERS.search(text):
            raise SystemExit(f"{args.write} has no markers of this benchmark")
        args.write.write_text(MARKERS.sub(lambda at: at[1] + block + at[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()
