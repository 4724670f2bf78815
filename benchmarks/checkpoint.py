"""What a checkpoint costs, against DeepSpeed: seconds to save and load, bytes on disk, memory at load.

    DEEPSPEED_PYTHON=/path/to/python python benchmarks/checkpoint.py [--ranks 2] [--stage 2] [--rounds 7] [--width 512]

All engines train the same model for one step and stay; then they take turns: each saves and loads once a round, while
the others sleep. A ratio is that of two neighbours of one round, so what else the machine does meanwhile weighs on
both; medians over the rounds are printed. Seconds are those of the slowest rank. Files are new each time and the disk
is idle at the start of a turn; what is loaded was just written, so it comes from the page cache for all.

DeepSpeed runs with each writer that it has, as far as it runs here: its default (``torch.save``), its "python" writer,
the same in another process ("decoupled"), and "fast", which needs libaio. Without DEEPSPEED_PYTHON only Shardline is
measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEEPSPEED: dict[str, dict[str, Any]] = {
    "deepspeed": {},
    "deepspeed python": {"checkpoint": {"writer": {"type": "python", "data_parallel": "replica"}}},
    "deepspeed decoupled": {
        "checkpoint": {"writer": {"type": "python", "decoupled": True, "data_parallel": "replica"}}
    },
    "deepspeed fast": {"checkpoint": {"writer": {"type": "fast", "data_parallel": "replica"}}},
}
"""Configurations of DeepSpeed, by the name of the job."""
OURS = "shardline"
POLL = 0.002
"""Seconds between two looks for the next turn."""
START_SECONDS, TURN_SECONDS = 300, 120


# -- one rank of one job -----------------------------------------------------------------------------------------------


def job(name: str, args: argparse.Namespace) -> None:
    """Build, train a step, then save and load whenever it is this job's turn."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch
    import torch.distributed as dist
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    width = args.width
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
                            for _ in range(args.layers)))  # fmt: skip
    numel = sum(param.numel() for param in model.parameters())
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": args.stage},
        "bf16": {"enabled": True},
    }
    if name == OURS:
        import shardline

        engine = shardline.initialize(model=model, config=config)[0]
    else:
        import deepspeed

        # its collectives for one host would be compiled now, and are not part of a checkpoint
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        config |= DEEPSPEED[name]
        os.environ |= {"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": str(args.ranks)}  # its writers ask for them
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # else it cannot load what these writers wrote
        engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    engine.backward(engine(torch.randn(2, width, dtype=torch.bfloat16)).float().square().mean())
    engine.step()

    def timed(action: Any) -> float:
        dist.barrier()
        start = time.perf_counter()
        action()
        seconds = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return seconds.item()

    lead = dist.get_rank() == 0
    for number in range(args.rounds + 1):
        folder = args.out / f"{name}-{number}"
        if lead:
            args.out.joinpath(f"{name}-{number}.ready").touch()
            while not args.out.joinpath(f"{name}-{number}.turn").exists():
                time.sleep(POLL)
        figures = {"save, s": timed(lambda folder=folder: engine.save_checkpoint(str(folder), tag="a"))}
        if name == "deepspeed decoupled":  # that was the time it blocks; now until it is there
            figures["blocks, s"] = figures["save, s"]
            figures["save, s"] += timed(lambda: engine.checkpoint_engine.commit(engine.checkpoint_engine.commit_info))
        figures["on disk, s"] = figures["save, s"] + timed(os.sync)  # Shardline's is there when the save returns
        before = peak(reset=True)
        figures["load, s"] = timed(lambda folder=folder: engine.load_checkpoint(str(folder), tag="a"))
        figures["MB at load"] = (peak() - before) / 1e6
        if name == OURS:
            figures["blocks, s"] = timed(lambda folder=folder: engine.save_checkpoint(folder, tag="b", async_save=True))
            engine.checkpoints.wait()
        figures["MB on disk"] = sum(file.stat().st_size for file in (folder / "a").rglob("*") if file.is_file()) / 1e6
        figures["MB of state"] = numel * 12 / 1e6
        if lead:
            part = args.out / f"{name}-{number}.part"
            part.write_text(json.dumps(figures))
            part.rename(args.out / f"{name}-{number}.json")
    dist.barrier()


def peak(reset: bool = False) -> float:
    """Bytes of the process's peak resident memory; ``reset`` begins a new peak (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    rows = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return (
        float(rows["VmHWM"].split()[0]) * 1024
        if "VmHWM" in rows
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )


# -- who is next -------------------------------------------------------------------------------------------------------


class Job:
    """A job's processes, asleep until their turn."""

    def __init__(self, name: str, python: str, out: Path, options: list[str], ranks: int) -> None:
        self.name, self.out = name, out
        self.log = out / f"{name}.log"
        launch = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        self.process = subprocess.Popen(
            [*launch, __file__, f"--job={name}", f"--out={out}", *options],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def wait_for(self, path: Path, seconds: float) -> bool:
        """Wait until ``path`` is there; False if the job ended before, or is too slow."""
        give_up = time.monotonic() + seconds
        while not path.exists():
            if self.process.poll() is not None or time.monotonic() > give_up:
                return False
            time.sleep(POLL)
        return True

    def turn(self, number: int) -> dict[str, float] | None:
        """Save and load once; None if that failed."""
        os.sync()
        (self.out / f"{self.name}-{number}.turn").touch()
        result = self.out / f"{self.name}-{number}.json"
        if not self.wait_for(result, TURN_SECONDS):
            return None
        shutil.rmtree(self.out / f"{self.name}-{number}", ignore_errors=True)
        figures: dict[str, float] = json.loads(result.read_text())
        return figures

    def end(self) -> None:
        """End its processes, and wait for them."""
        self.process.terminate()
        self.process.wait()

    def why(self) -> str:
        """The last error in its output."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()]
        errors = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
        return errors[-1] if errors else "no answer in time"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument(
        "--peers", nargs="*", choices=tuple(DEEPSPEED), default=list(DEEPSPEED), help="DeepSpeed's writers to measure"
    )
    parser.add_argument("--job", choices=(OURS, *DEEPSPEED), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job(args.job, args)
        return
    options = [f"--{name}={getattr(args, name)}" for name in ("ranks", "stage", "rounds", "width", "layers")]
    pythons = {OURS: sys.executable}
    if "DEEPSPEED_PYTHON" in os.environ:
        pythons |= dict.fromkeys(args.peers, os.environ["DEEPSPEED_PYTHON"])
    jobs: list[Job] = []
    refused: dict[str, str] = {}
    rounds: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, python in pythons.items():  # one after the other: starting is work
                started = Job(name, python, Path(folder), options, args.ranks)
                jobs.append(started)
                started.wait_for(Path(folder, f"{name}-0.ready"), START_SECONDS)
            for number in range(args.rounds + 1):  # the first warms up
                for each in list(jobs):
                    figures = each.turn(number)
                    if figures is None:
                        refused[each.name] = each.why()
                        jobs.remove(each)
                        each.end()
                        rounds.pop(each.name, None)
                    elif number:
                        rounds.setdefault(each.name, []).append(figures)
        finally:
            for each in jobs:
                each.end()
    report(rounds, refused, args)


def report(rounds: dict[str, list[dict[str, float]]], refused: dict[str, str], args: argparse.Namespace) -> None:
    """Print medians, and ratios of one round."""
    keys = list(dict.fromkeys(key for figures in rounds.values() for key in figures[0]))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"stage {args.stage}, bf16, {args.ranks} ranks, medians of {args.rounds} rounds; load of the machine: {load}")
    print(" " * 20 + "".join(f"{key:>14}" for key in keys))
    for name, figures in rounds.items():
        medians = (statistics.median(row[key] for row in figures) if key in figures[0] else None for key in keys)
        print(f"{name:<20}" + "".join(f"{'-' if value is None else f'{value:.3g}':>14}" for value in medians))
    for name, figures in rounds.items():
        if name != OURS:
            for key in ("save, s", "on disk, s", "load, s"):
                ratios = sorted(ours[key] / theirs[key] for ours, theirs in zip(rounds[OURS], figures, strict=True))
                print(
                    f"{key.partition(',')[0]}: shardline / {name}: median {statistics.median(ratios):.2f} "
                    f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
                )
    for name, why in refused.items():
        print(f"{name} does not run here: {why}")


if __name__ == "__main__":
    main()
