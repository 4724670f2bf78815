"""Measure the memory of rank 0 while one step runs, at stages 0 to 3, and draw it. Linux with glibc only.

    .venv/bin/python docs/scripts/memory_over_a_step.py --ranks 4 --out docs/images/memory-over-a-step.png

Looked at after every operation of torch: the bytes that the process has allocated and not freed (glibc's ``mallinfo2``,
all threads), above what it had before the model was built. Strong lines are bytes in use: weights, gradients, masters,
optimizer state, activations, what is in flight. Thin lines add the free buffers that the engine's pool keeps for the
next use. Dashed lines are the state that rests between steps by the formula of ``Plan.state_bytes``, less gradients.
Buffers are kept out of large pages here, which are not glibc's.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import shardline
from shardline.sharding import buffer
from shardline.testing import run_distributed

WIDTH, DEPTH, BATCH, MIB = 1024, 8, 64, 2**20
PHASES = ("forward", "backward", "step")
Trace = dict[str, list[tuple[float, float, float]]]
"""For each phase (time, MiB in use, MiB held), with time from 0 at its start to 1 at its end."""


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


_mallinfo2 = ctypes.CDLL(None).mallinfo2
_mallinfo2.restype = _Mallinfo


def allocated() -> int:
    """Bytes allocated and not freed, in every arena and by mmap."""
    found = _mallinfo2()
    return int(found.uordblks + found.hblkhd)


class Watch(TorchDispatchMode):
    """Writes down (phase, time, bytes in use, bytes held) after every operation while a phase is on."""

    def __init__(self, pool: Any, base: int) -> None:
        super().__init__()
        self.pool, self.base = pool, base
        self.phase: str | None = None
        self.seen: dict[str, list[tuple[float, int, int]]] = {name: [] for name in PHASES}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.look()
        return result

    def look(self) -> None:
        """Write down what is held now."""
        if self.phase is not None:
            held = allocated() - self.base
            free = sum(memory.nbytes() for memory in self.pool._free)
            self.seen[self.phase].append((time.perf_counter(), held - free, held))

    def trace(self) -> Trace:
        """Each phase from 0 to 1, in MiB."""
        result: Trace = {}
        for name, looks in self.seen.items():
            start, stop = looks[0][0], looks[-1][0]
            result[name] = [((at - start) / (stop - start), used / MIB, held / MIB) for at, used, held in looks]
        return result


class Block(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def measure(stage: int, warm_up: int = 3) -> tuple[Trace, float]:
    """Train ``warm_up`` steps and watch the next. Returns the trace and the formula's MiB for this rank."""
    base = allocated()
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": stage},
        "communication_transport": "gloo",
    }
    model = nn.Sequential(*(Block() for _ in range(DEPTH)))
    buffer._LARGE_PAGE = sys.maxsize
    engine, *_ = shardline.initialize(model=model, config=config)
    x = torch.randn(BATCH, WIDTH)
    with Watch(engine.trainables.layout.pool, base) as watch:
        for step in range(warm_up + 1):
            on = step == warm_up
            loss: Any = None
            for name in PHASES:
                watch.phase = name if on else None
                watch.look()
                if name == "forward":
                    loss = F.mse_loss(engine(x), x)
                elif name == "backward":
                    engine.backward(loss)
                else:
                    engine.step()
                watch.look()
    row, plan = shardline.plan.placement.STAGES[stage], engine.trainables.layout.plan
    rest = plan.state_bytes(row, 0) - gradient_bytes(plan, row)
    engine.destroy()
    return watch.trace(), rest / MIB


def gradient_bytes(plan: Any, row: Any) -> int:
    """What the formula counts for gradients: they are given back after a step."""
    sharded = row.gradients is shardline.plan.placement.Placement.SHARDED
    buckets = [bucket for unit in plan.units for bucket in unit.buckets]
    return sum(4 * (bucket.cuts[1] if sharded else bucket.size) for bucket in buckets)


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
