"""Measure what torch holds on rank 0 while one step runs, at stages 0 to 3, and draw it.

    .venv/bin/python docs/scripts/memory_over_a_step.py --out docs/images/memory-over-a-step.png

The figure counts bytes that torch allocated on the CPU and has not freed, from before the model was built: weights,
gradients, masters and optimizer state, activations, and the memory that the pool keeps for the next gather. It is what
torch's profiler saw, not the size of the process. The dashed lines are the state that rests between steps by the
formula of :meth:`shardline.plan.Plan.state_bytes`, without gradients.
"""

from __future__ import annotations

import argparse
import sys
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
Trace = dict[str, list[tuple[float, float]]]
"""For each phase, MiB held at points in time from 0 (its start) to 1 (its end)."""


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
    return cut(watched.profiler.kineto_results.events()), rest / MIB


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


def cut(events: Any) -> Trace:
    """The bytes held over time, cut into phases; each phase is stretched to the same length."""
    memory = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    memory.sort()
    held = list(accumulate(size for _, size in memory))
    spans = {event.name(): (event.start_ns(), event.end_ns()) for event in events if event.name() in PHASES}
    trace: Trace = {}
    for name in PHASES:
        start, stop = spans[name]
        before = [size for (at, _), size in zip(memory, held, strict=True) if at < start]
        trace[name] = [(0.0, before[-1] / MIB)]
        for (at, _), size in zip(memory, held, strict=True):
            if start <= at <= stop:
                trace[name].append(((at - start) / (stop - start), size / MIB))
        trace[name].append((1.0, trace[name][-1][1]))
    return trace


def draw(found: dict[int, tuple[Trace, float]], ranks: int, path: Path) -> None:
    """Save the traces of all stages as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot(ylabel="MiB held by torch on rank 0")
    colours = ("#9467bd", "#1f77b4", "#2ca02c", "#d62728")
    for stage, (trace, rest) in found.items():
        points = [(position + at, size) for position, name in enumerate(PHASES) for at, size in trace[name]]
        axes.step(*zip(*points, strict=True), where="post", color=colours[stage], label=f"stage {stage}", lw=1.6)
        axes.axhline(rest, color=colours[stage], lw=0.8, ls="--", alpha=0.6)
    for edge in (1, 2):
        axes.axvline(edge, color="0.7", lw=0.8)
    axes.set_xticks([0.5, 1.5, 2.5], PHASES)
    axes.tick_params(axis="x", length=0)
    axes.set(xlim=(0, 3), ylim=(0, None))
    parameters = DEPTH * (4 * WIDTH * WIDTH + 3 * WIDTH)
    axes.set_title(
        f"one step of {parameters / 1e6:.1f}M parameters, fp32, AdamW, {ranks} ranks; dashed: state by the formula",
        fontsize=10,
    )
    axes.legend(ncols=4, loc="upper center", frameon=False)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
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
        peak = max(size for points in trace.values() for _, size in points)
        between = trace["forward"][0][1]
        sys.stdout.write(f"stage {stage}: between steps {between:.0f} MiB (formula {rest:.0f}), peak {peak:.0f} MiB\n")


if __name__ == "__main__":
    main()
