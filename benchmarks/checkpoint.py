"""What a checkpoint costs, against DeepSpeed in one run: seconds to save and load, bytes, memory at load.

    DEEPSPEED_PYTHON=/path/to/python python benchmarks/checkpoint.py [--ranks 2] [--stage 2] [--rounds 5] [--width 512]

Both train the same model for one step, and then save and load it again and again. Without DEEPSPEED_PYTHON only
Shardline is measured. Seconds are medians over the rounds, each of the slowest rank; files are new each time, and what
is loaded was just written, so it comes from the page cache for both.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def job(engine_name: str, args: argparse.Namespace, out: Path) -> None:
    """One rank of one job: writes its figures as JSON."""
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
    if engine_name == "shardline":
        import shardline

        engine = shardline.initialize(model=model, config=config)[0]
    else:
        import deepspeed

        engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    engine.backward(engine(torch.randn(2, width, dtype=torch.bfloat16)).float().square().mean())
    engine.step()

    def timed(action: object) -> float:
        dist.barrier()
        start = time.perf_counter()
        action()  # type: ignore[operator]
        seconds = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return seconds.item()

    figures: dict[str, list[float]] = {"save": [], "load": [], "async": [], "anonymous MB at load": []}
    for number in range(args.rounds + 1):
        folder = out / f"{engine_name}-{number}"
        save = timed(lambda folder=folder: engine.save_checkpoint(str(folder), tag="a"))
        before = _anonymous_peak(reset=True)
        load = timed(lambda folder=folder: engine.load_checkpoint(str(folder), tag="a"))
        rise = _anonymous_peak() - before
        if engine_name == "shardline":
            blocking = timed(lambda folder=folder: engine.save_checkpoint(str(folder), tag="b", async_save=True))
            engine.checkpoints.wait()
        else:
            blocking = float("nan")
        if number:  # the first round warms up
            for key, value in zip(figures, (save, load, blocking, rise / 1e6), strict=True):
                figures[key].append(value)
    size = sum(file.stat().st_size for file in (out / f"{engine_name}-1" / "a").rglob("*") if file.is_file())
    if dist.get_rank() == 0:
        result = {key: statistics.median(values) for key, values in figures.items()}
        result |= {"MB": size / 1e6, "state MB": numel * 12 / 1e6, "parameters M": numel / 1e6}
        (out / f"{engine_name}.json").write_text(json.dumps(result))
    dist.barrier()


def _anonymous_peak(reset: bool = False) -> float:
    """Bytes of the process's peak resident memory; ``reset`` begins a new peak (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    rows = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return (
        float(rows["VmHWM"].split()[0]) * 1024
        if "VmHWM" in rows
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--job", choices=("shardline", "deepspeed"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job(args.job, args, args.out)
        return
    pythons = {"shardline": sys.executable}
    if "DEEPSPEED_PYTHON" in os.environ:
        pythons["deepspeed"] = os.environ["DEEPSPEED_PYTHON"]
    options = [f"--{name}={getattr(args, name)}" for name in ("ranks", "stage", "rounds", "width", "layers")]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, python in pythons.items():
            launch = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
            command = [*launch, __file__, f"--job={name}", f"--out={folder}", *options]
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
            results[name] = json.loads(Path(folder, f"{name}.json").read_text())
    keys = list(next(iter(results.values())))
    print(f"stage {args.stage}, bf16, {args.ranks} ranks, medians of {args.rounds} rounds")
    print(" " * 12 + "".join(f"{key:>22}" for key in keys))
    for name, result in results.items():
        print(f"{name:<12}" + "".join(f"{result[key]:>22.4g}" for key in keys))


if __name__ == "__main__":
    main()
