"""Measure what torch holds on rank 0 while one step runs, at stages 0 to 3, and draw it.

    .venv/bin/python docs/scripts/memory_over_a_step.py --out docs/images/memory-over-a-step.png

Strong lines are bytes in use: what torch allocated on the CPU and has not freed since before the model was built
(weights, gradients, masters, optimizer state, activations), less the free buffers that the engine's pool keeps. Thin
lines are all that torch holds, the pool included. Both are what torch's profiler saw, not the size of the process.
Dashed lines are the state that rests between steps by the formula of :meth:`shardline.plan.Plan.state_bytes`, without
gradients.
"""

from __future__ import annotations

import argparse
import sys
import time
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import shardline
from shardline.testing import run_distributed

WIDTH, DEPTH, BATCH, MIB = 1024, 8, 64, 2**20
PHASES = ("forward", "backward", "step")
Trace = dict[str, list[tuple[float, float, float]]]
"""For each phase (time, MiB in use, MiB held), with time from 0 at its start to 1 at its end."""


class Block(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def measure(stage: int, warm_up: int = 2) -> tuple[Trace, float]:
    """Train ``warm_up`` steps and trace the next. Returns the trace and the formula's MiB for this rank."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        torch.manual_seed(0)
        config = {
            "train_micro_batch_size_per_gpu": BATCH,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "zero_optimization": {"stage": stage},
        }
        model = nn.Sequential(*(Block() for _ in range(DEPTH)))
        engine, *_ = shardline.initialize(model=model, config=config)
        free = watch_pool(engine._layout.pool)
        x = torch.randn(BATCH, WIDTH)
        for step in range(warm_up + 1):
            mark = record_function if step == warm_up else _Unmarked
            with mark("forward"):
                loss = F.mse_loss(engine(x), x)
            with mark("backward"):
                engine.backward(loss)
            with mark("step"):
                engine.step()
        row = shardline.placement.STAGES[stage]
        plan = engine._layout.plan
        rest = plan.state_bytes(row, 0) - gradient_bytes(plan, row)
        engine.destroy()
    return cut(watched.profiler.kineto_results.events(), free), rest / MIB


def watch_pool(pool: Any) -> list[tuple[int, int]]:
    """From now on write down (Unix time in ns, bytes that are free in ``pool``) whenever that changes."""
    log = [(0, 0)]

    def noted(call: Any) -> Any:
        def wrapper(*args: Any) -> Any:
            result = call(*args)
            log.append((time.time_ns(), sum(memory.nbytes() for memory in pool._free)))
            return result

        return wrapper

    pool.take, pool.give = noted(pool.take), noted(pool.give)
    return log


class _Unmarked:
    """In the place of ``record_function`` where nothing is to be recorded."""

    def __init__(self, name: str) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def gradient_bytes(plan: Any, row: Any) -> int:
    """What the formula counts for gradients: they are given back after a step."""
    sharded = row.gradients is shardline.placement.Placement.SHARDED
    slabs = [slab for unit in plan.units for slab in unit.slabs]
    return sum(4 * (slab.boundaries[1] if sharded else slab.size) for slab in slabs)


def cut(events: Any, free: list[tuple[int, int]]) -> Trace:
    """The bytes over time, cut into phases; each phase is stretched to the same length."""
    memory = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = list(zip((at for at, _ in memory), accumulate(size for _, size in memory), strict=True))
    spans = {event.name(): (event.start_ns(), event.end_ns()) for event in events if event.name() in PHASES}
    trace: Trace = {}
    for name, (start, stop) in spans.items():
        moments = [start, *sorted(at for at, _ in (*held, *free) if start < at < stop), stop]
        points = [(at, _last(held, at) / MIB, _last(free, at) / MIB) for at in moments]
        trace[name] = [((at - start) / (stop - start), total - kept, total) for at, total, kept in points]
    return trace


def _last(series: list[tuple[int, int]], at: int) -> int:
    """The value of a step function at a moment."""
    return series[bisect_right(series, at, key=lambda point: point[0]) - 1][1]


def draw(found: dict[int, tuple[Trace, float]], ranks: int, path: Path) -> None:
    """Save the traces of all stages as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(ylabel="MiB on rank 0")
    colours = ("#9467bd", "#1f77b4", "#2ca02c", "#d62728")
    for stage, (trace, rest) in found.items():
        points = [(place + at, *sizes) for place, name in enumerate(PHASES) for at, *sizes in trace[name]]
        times, used, held = zip(*points, strict=True)
        axes.step(times, used, where="post", color=colours[stage], label=f"stage {stage}", lw=1.8)
        axes.step(times, held, where="post", color=colours[stage], lw=0.7, alpha=0.6)
        axes.axhline(rest, color=colours[stage], lw=0.8, ls="--", alpha=0.8)
    for edge in (1, 2):
        axes.axvline(edge, color="0.7", lw=0.8)
    axes.set_xticks([0.5, 1.5, 2.5], PHASES)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(0, 3)
    parameters = DEPTH * (4 * WIDTH * WIDTH + 3 * WIDTH)
    axes.set_title(
        f"One step of {parameters / 1e6:.1f}M parameters in fp32 with AdamW on {ranks} ranks\n"
        f"strong: in use; thin: with the pool's free buffers; dashed: resting state by the formula",
        fontsize=10,
    )
    axes.legend(ncols=4, loc="upper center", frameon=False)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure all stages, say the peaks, draw."""
    parser = argparse.ArgumentParser(description="Draw the memory of one step at stages 0 to 3.")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/memory-over-a-step.png"))
    args = parser.parse_args()
    found = {stage: run_distributed(measure, args.ranks, stage, timeout=300)[0] for stage in range(4)}
    draw(found, args.ranks, args.out)
    for stage, (trace, rest) in found.items():
        peak, total = (max(point[index] for points in trace.values() for point in points) for index in (1, 2))
        sys.stdout.write(
            f"stage {stage}: between steps {trace['forward'][0][1]:.0f} MiB in use (formula {rest:.0f}), "
            f"peak {peak:.0f}, with the pool {total:.0f}\n"
        )


if __name__ == "__main__":
    main()
