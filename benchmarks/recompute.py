"""What activation checkpointing and `engine.compile()` cost and save: python benchmarks/recompute.py

A GPT of 34M parameters (8 blocks of width 512), fp32, AdamW, one CPU process with one thread. Each round trains every
way in turn. Peak is what one step holds at once beyond what lies there between steps, by torch's own allocator. Times
are processor times, as medians of the ratio to the plain way in the same round.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import shardline

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "gpt"))
from model import GPT

WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, False),
    "every second block": ({"enabled": True, "every": 2}, False),
    "every block": ({"enabled": True}, False),
    "compiled": ({}, True),
    "compiled, every block": ({"enabled": True}, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each way in a round")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--backend", default="inductor", help="of torch.compile; inductor needs a C++ compiler")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, int, float]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            found[way].append(_measure(way, options))
    print("| way | peak of a step, MB | processor time | loss |\n|---|---|---|---|")
    for way, rounds in found.items():
        ratio = median(seconds / plain[0] for (seconds, _, _), plain in zip(rounds, found["plain"], strict=True))
        print(f"| {way} | {median(peak for _, peak, _ in rounds) / 1e6:.0f} | {ratio:.2f} | {rounds[0][2]:.6f} |")


def _measure(way: str, options: argparse.Namespace) -> tuple[float, int, float]:
    """Processor seconds of a step, bytes of its peak, and the last loss."""
    section, compiled = WAYS[way]
    torch.manual_seed(0)
    vocabulary, context = (64, 16) if options.small else (8192, 128)
    model = GPT(vocabulary, context, *((2, 32, 2) if options.small else (8, 512, 8)))
    engine = shardline.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": options.batch,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "activation_checkpointing": section,
        },
    )[0]
    if compiled:
        engine.compile(backend=options.backend)
    tokens = torch.randint(vocabulary, (options.batch, context + 1))
    losses: list[float] = []

    def step() -> None:
        loss = engine(tokens[:, :-1], tokens[:, 1:])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())

    step()
    seconds = []
    for _ in range(options.steps):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    engine.destroy()
    return median(seconds), peak, losses[-1]


if __name__ == "__main__":
    main()
