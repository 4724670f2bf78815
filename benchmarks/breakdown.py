"""Where the time of a step goes: the functions that do its work are timed, each without the ones that it calls.

    python benchmarks/breakdown.py [--stage 2] [--dtype fp32] [--model gpt] [--steps 20] [--transport auto]

Two ranks of one thread each; rank 0's medians over the steps, and the same of the hand-written loop on both ranks
without communication. What no row names is "the rest": Python between the calls.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Stopwatch:
    """Seconds by name, each without the time of what was timed within it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Count the time of ``owner.attribute`` to ``name`` from now on."""
        setattr(owner, attribute, self.timed(getattr(owner, attribute), name))

    def timed(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                whole = time.perf_counter() - start
                self.seconds[name] += whole - self._inner.pop()
                if self._inner:
                    self._inner[-1] += whole

        return timed


def watch(clock: Stopwatch) -> None:
    """Time the functions of the engine that do the work of a step."""
    import shardline.comm
    import shardline.comm.peer_memory as peer_memory
    import shardline.comm.transport as transport
    import shardline.sharding.step
    from shardline.sharding.flat_grads import FlatGrads
    from shardline.sharding.flat_weights import FlatWeights

    clock.wrap(FlatGrads, "_pack", "pack gradients")
    clock.wrap(peer_memory, "add_in_order", "sum gradients")
    clock.wrap(transport, "add_in_order", "sum gradients")
    clock.wrap(FlatWeights, "refresh", "cast masters")
    clock.wrap(peer_memory.Peers, "wait", "execute and wait")
    clock.wrap(peer_memory, "advance_all", "execute and wait")
    clock.wrap(transport.Work, "wait", "execute and wait")
    clock.wrap(shardline.sharding.step, "square_sum", "norm")
    clock.wrap(shardline.comm.Comm, "all_gather_vector", "compare (step report)")


def job(args: argparse.Namespace) -> None:
    """One rank: prints the table on rank 0."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]
    import torch
    from loops import ENGINES, Work
    from models import MODELS

    torch.set_num_threads(1)
    import shardline

    shardline.init_distributed()
    spec = MODELS[args.model]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    config = {
        "train_micro_batch_size_per_gpu": spec.samples,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": args.dtype == "bf16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": args.stage},
        "communication_transport": args.transport,
    }
    rank = int(os.environ["RANK"])
    batches = spec.data(rank, dtype)
    clock = Stopwatch()
    watch(clock)
    engine = shardline.initialize(model=spec.fresh(), config=config)[0]
    clock.wrap(engine.optimizer, "step", "AdamW")
    steps: list[dict[str, float]] = []
    for number in range(args.steps + 5):
        clock.seconds.clear()
        start = time.perf_counter()
        loss = clock.timed(engine, "forward")(*batches[number % len(batches)])
        clock.timed(engine.backward, "backward")(loss)
        clock.timed(engine.step, "the rest of step()")()
        steps.append({**clock.seconds, "whole": time.perf_counter() - start})
    engine.destroy()
    hand = ENGINES["compute"].make(spec.fresh(), Work(dtype=dtype, micro=spec.samples))
    alone = []
    for number in range(args.steps + 5):
        start = time.perf_counter()
        hand([batches[number % len(batches)]])
        alone.append(time.perf_counter() - start)
    if rank == 0:
        middle = {name: statistics.median(step.get(name, 0.0) for step in steps[5:]) for name in steps[-1]}
        whole = middle.pop("whole")
        limit = statistics.median(alone[5:])
        print(f"{args.model}, {args.dtype}, stage {args.stage}, transport {args.transport}\n")
        print("| part | ms | share |\n|---|---|---|")
        for name, seconds in sorted(middle.items(), key=lambda item: -item[1]):
            print(f"| {name} | {1e3 * seconds:.1f} | {100 * seconds / whole:.1f} % |")
        print(f"| the whole step | {1e3 * whole:.1f} | 100 % |")
        print(f"| the hand-written loop, without communication | {1e3 * limit:.1f} | {100 * limit / whole:.1f} % |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--model", default="gpt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--transport", choices=["auto", "gloo"], default="auto")
    args = parser.parse_args()
    if "RANK" in os.environ:
        job(args)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *sys.argv]
    sys.exit(subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode)


if __name__ == "__main__":
    main()
