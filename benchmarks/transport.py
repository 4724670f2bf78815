"""What a gather, a reduction and the row of a step cost by direct reading and over gloo, and what a plain copy costs.

    python benchmarks/transport.py [--ranks 2] [--megabytes 16] [--rounds 50]

The transports take turns in one run. Milliseconds are medians (and minima) over the rounds, each of the slowest rank;
the copy is one of as many bytes in private memory, made by all ranks at once. A gather starts from a shard at rest, as
at stage 3, and a reduction sums in fp32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from shardline.comm import Comm
from shardline.sharding.buffer import BufferPool
from shardline.testing import run_distributed

CPU = torch.device("cpu")
Times = dict[tuple[str, str, str], list[float]]


def measure(megabytes: int, rounds: int) -> Times:
    """Seconds on this rank by (transport, what, dtype)."""
    torch.set_num_threads(1)
    comms = {name: Comm(dist.group.WORLD, CPU, transport=name) for name in ("auto", "gloo")}
    times: Times = {}
    for dtype in (torch.float32, torch.bfloat16):
        cases = {name: cases_of(comm, megabytes << 20, dtype) for name, comm in comms.items()}
        first, second = (torch.ones((megabytes << 20) // dtype.itemsize, dtype=dtype) for _ in range(2))
        cases["auto"]["copy"] = lambda first=first, second=second: first.copy_(second)
        for turn in range(rounds + 5):
            for name, actions in cases.items():
                for what, action in actions.items():
                    comms["auto"].rows(torch.zeros(8))  # all begin at once
                    begin = time.perf_counter()
                    action()
                    if turn >= 5:
                        times.setdefault((name, what, str(dtype)[6:]), []).append(time.perf_counter() - begin)
    for comm in comms.values():
        comm.close()
    return times


def cases_of(comm: Comm, size: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    pool, world = BufferPool(CPU, comm.wait_for_readers), comm.data.size
    shard = size // dtype.itemsize // world
    cuts = [shard * rank for rank in range(world + 1)]
    own, gradients = pool.borrow(shard, dtype).zero_(), pool.borrow(shard * world, dtype).zero_()
    out, row = torch.empty(shard), torch.zeros(8, dtype=torch.float64)
    whole = pool.borrow(shard * world, dtype)
    return {
        "gather": lambda: comm.gathers.gather(0, whole, cuts, own=own).wait(),
        "reduce": lambda: comm.reductions.reduce(0, gradients, cuts, out, add=False, scratch=pool).wait(),
        "row": lambda: comm.all_gather_vector(row),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=16, help="of the whole buffer")
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    found = run_distributed(measure, args.ranks, args.megabytes, args.rounds, timeout=600)
    slowest = {key: [max(each) for each in zip(*(times[key] for times in found), strict=True)] for key in found[0]}
    print(f"{args.ranks} ranks, {args.megabytes} MB: ms, median (minimum) of {args.rounds}\n")
    print("|        |          | copy | direct | gloo | gloo / direct |\n|---|---|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        for what in ("gather", "reduce", "row"):
            direct, gloo = slowest["auto", what, dtype], slowest["gloo", what, dtype]
            copy = shown(slowest["auto", "copy", dtype]) if what != "row" else ""
            ratio = statistics.median(other / one for one, other in zip(direct, gloo, strict=True))
            print(f"| {what} | {dtype} | {copy} | {shown(direct)} | {shown(gloo)} | {ratio:.1f} |")


def shown(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.2f} ({min(seconds) * 1e3:.2f})"


if __name__ == "__main__":
    main()
