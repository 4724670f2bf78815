"""A step of Transformers' Trainer on two CPU ranks: without an engine, under DDP, DeepSpeed and Shardline.

    DEEPSPEED_PYTHON=/path/to/python python benchmarks/trainer.py [--rounds 5] [--steps 12] [--stages 2 3]
    .venv-integrations/bin/python benchmarks/trainer.py --stages --in-place 0 1 2 3

`shardline` is the stand-in for DeepSpeed, `in-place` shardline.integrations.transformers.Trainer.

The interpreter that runs this needs Transformers and Accelerate (`make test-deepspeed` makes one, .venv-integrations);
that of DEEPSPEED_PYTHON DeepSpeed besides. The same script, model (a GPT-2), data and ds_config everywhere. Each round
runs every way once, one after the other; a ratio is taken within a round, and the median over rounds is printed. The
peer of the stand-in is DeepSpeed, that of `in-place` DDP.
Without an engine each rank trains alone. The processor time counts all threads of rank 0, the wall clock what
else the machine does. Memory is what rank 0 holds at most beyond its size before the model is made.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LENGTH, MICRO = 128, 4
SIZES = {"n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": 2048, "n_positions": LENGTH}


def train(way: str, steps: int, out: str) -> None:
    """One rank of one way; rank 0 writes its figures."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

    torch.set_num_threads(1)
    given: dict[str, Any] = {"use_cpu": True}
    kind, _, stage = way.rpartition("-")
    if kind == "in-place":
        from shardline.integrations.transformers import Trainer as Sharded

        Trainer = partial(Sharded, shardline={"zero_optimization": {"stage": int(stage)}})
    elif kind:
        given = {"accelerator_config": {"use_configured_state": True}, "deepspeed": ds_config(int(stage))}
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        from accelerate import PartialState

        PartialState(backend="gloo")  # Accelerate takes gloo only where it is named
        if kind == "deepspeed":
            import deepspeed

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for inference; it would be compiled
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    set_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0))
    ids = torch.randint(0, SIZES["vocab_size"], (4 * MICRO * steps, LENGTH))
    marks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            marks.append((time.perf_counter(), time.process_time()))

    arguments = TrainingArguments(
        output_dir=f"{out}.run",
        per_device_train_batch_size=MICRO,
        max_steps=steps,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **given,
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.add_callback(Clock())
    loss = trainer.train().training_loss
    walls, works = ([b - a for a, b in itertools.pairwise(one)][3:] for one in zip(*marks, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if os.environ.get("RANK", "0") == "0" and not os.environ.get("ALONE"):
        found = {
            "wall": statistics.median(walls),
            "work": statistics.median(works),
            "peak": peak - before,
            "loss": loss,
        }
        Path(out).write_text(json.dumps(found))


def ds_config(stage: int) -> dict[str, Any]:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "overlap_comm": True, "contiguous_gradients": True},
    }


def run(way: str, python: str, steps: int, out: Path) -> dict[str, float]:
    """Start both ranks of ``way`` and read the figures of rank 0."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = [str(ROOT / "src")] if way.startswith(("shardline", "in-place")) else []
    if way.startswith("shardline"):
        path.insert(0, str(ROOT / "src/shardline/compat/deepspeed/path"))
    ranks = []
    for rank in range(2):
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment |= {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if way == "alone":
            environment |= {"ALONE": "1"} if rank else {}
        else:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [python, __file__, "--job", way, "--steps", str(steps), "--out", str(out)]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    for process in ranks:
        error = process.communicate()[1]
        if process.returncode:
            raise SystemExit(f"{way} failed:\n{error.decode()[-4000:]}")
    found: dict[str, float] = json.loads(out.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--stages", type=int, nargs="*", default=[2, 3])
    parser.add_argument("--in-place", type=int, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/trainer")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        train(args.job, args.steps, str(args.out))
        return
    peer = os.environ.get("DEEPSPEED_PYTHON")
    ways = ["alone", "ddp"]
    for stage in args.stages:
        ways += [f"deepspeed-{stage}"] * (peer is not None) + [f"shardline-{stage}"]
    ways += [f"in-place-{stage}" for stage in args.in_place]
    args.out.mkdir(parents=True, exist_ok=True)
    rounds = []
    for number in range(args.rounds):
        pythons = {way: (peer if way.startswith("deepspeed") else None) or sys.executable for way in ways}
        rounds.append({way: run(way, pythons[way], args.steps, args.out / f"{way}.json") for way in ways})
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr)
    (args.out / "rounds.json").write_text(json.dumps(rounds))
    print("| way | step, ms | processor time, ms | of the peer's: step | processor time | memory, MB | loss |")
    print("|---|---|---|---|---|---|---|")
    for way in ways:
        middle = {key: statistics.median(each[way][key] for each in rounds) for key in ("wall", "work", "peak", "loss")}
        other = "ddp" if way.startswith("in-place") else way.replace("shardline", "deepspeed")
        shares = [
            f"{statistics.median(each[way][key] / each[other][key] for each in rounds):.2f}"
            if other in rounds[0] and other != way
            else ""
            for key in ("wall", "work")
        ]
        print(
            f"| {way} | {middle['wall'] * 1e3:.0f} | {middle['work'] * 1e3:.0f} | {shares[0]} | {shares[1]} | "
            f"{middle['peak'] / 1024:.0f} | {middle['loss']:.5f} |"
        )


if __name__ == "__main__":
    main()
