"""Train a small character GPT on the prose of Python's own documentation, on as many processes as there are.

    shardline run --nproc 2 examples/gpt/train.py    # or torchrun, or one process: python examples/gpt/train.py

The engine's config is a file, ``config.json``; the options override what one tries first. A run is its folder: the
same command with the same ``--out`` goes on from the newest checkpoint there, on as many processes as there are now.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from data import Corpus, Windows
from model import GPT
from report import Journal, table
from torch.utils.data import default_collate
from tqdm import tqdm

import shardline
from shardline.events import Scalars
from shardline.runtime.memory import peak_bytes

HERE = Path(__file__).resolve().parent
MODEL = {"context": 128, "depth": 4, "width": 256, "heads": 4}
BAR = "{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train a small character GPT on Python's own documentation.")
    parser.add_argument("--config", type=Path, default=HERE / "config.json", help="the engine's config, a JSON file")
    parser.add_argument("--stage", type=int, choices=range(4), help="ZeRO stage, instead of the config's")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="compute dtype, instead of the config's")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of the config's total_num_steps")
    parser.add_argument(
        "--report-every", type=int, default=10, help="steps between two reports of the mean loss over these steps"
    )
    parser.add_argument("--eval-every", type=int, default=40, help="steps between two looks at the held-out text")
    parser.add_argument("--sample", type=int, default=400, help="characters to generate at the end")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpt"), help="folder of the run: checkpoints, losses, their picture"
    )
    return parser.parse_args()


def configure(args: argparse.Namespace) -> dict[str, Any]:
    """Read the config file and lay the command line over it."""
    config: dict[str, Any] = json.loads(args.config.read_text())
    if args.stage is not None:
        config.setdefault("zero_optimization", {})["stage"] = args.stage
    if args.dtype is not None:
        config |= {dtype: {"enabled": dtype == args.dtype} for dtype in ("bf16", "fp16")}
    if args.steps is not None:
        schedule = config["scheduler"]["params"]
        schedule["total_num_steps"] = args.steps
        schedule["warmup_num_steps"] = min(schedule["warmup_num_steps"], args.steps // 2)
    config.setdefault("checkpoint", {}).setdefault("dir", str(args.out / "checkpoints"))
    config.setdefault("run_log", {}).setdefault("dir", str(args.out))
    return config


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the micro-batches of one epoch after another; the loader shuffles each again."""
    while True:
        yield from loader


@torch.no_grad()
def evaluate(engine: shardline.Engine, windows: Windows, batch: int = 32) -> float:
    """Return the mean loss over ``windows`` in nats per character; all ranks share the work and get the result."""
    engine.eval()
    # As many pieces, so as many forwards, on each rank: at stage 3 a forward is something that all ranks do together.
    world = engine.world_size
    rounds = math.ceil(len(windows) / (batch * world))
    total = torch.zeros(2, device=engine.device)
    for piece in torch.arange(len(windows)).tensor_split(rounds * world)[engine.global_rank :: world]:
        tokens, targets = default_collate([windows[index] for index in piece.tolist()])
        loss = engine(tokens.to(engine.device), targets.to(engine.device))
        total += torch.stack([loss.float() * len(piece), torch.full_like(total[0], len(piece))])
    dist.all_reduce(total)
    engine.train()
    return float(total[0] / total[1])


def train(engine: shardline.Engine, loader: Any, held_out: Windows, steps: int, args: argparse.Namespace) -> Journal:
    """Train until ``steps`` optimizer steps are done, looking at the held-out text on the way.

    A resumed engine counts on from its checkpoint, and the loader from the batch after it.
    """
    journal = Journal(
        engine.device, args.out / "losses.jsonl" if engine.global_rank == 0 else None, engine.global_steps
    )
    held_out_loss(engine, journal, held_out)
    batches = endless(loader)
    journal.open()
    with tqdm(
        total=steps,
        initial=engine.global_steps,
        bar_format=BAR,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; in a log file a bar is a line each time
        disable=engine.global_rank != 0,
    ) as bar:
        while engine.global_steps < steps:
            for tokens, targets in islice(batches, engine.gradient_accumulation_steps()):
                loss = engine(tokens.to(engine.device), targets.to(engine.device))
                engine.backward(loss)
                engine.step()
                journal.add(loss, loader.samples * tokens.shape[1])
            step = engine.global_steps
            bar.update(step - bar.n)
            look = step % args.eval_every == 0 or step >= steps
            if look or step % args.report_every == 0:
                journal.close(step)
                bar.set_postfix_str(
                    f"loss {journal.train[step]:.3f}, held out {journal.held_out[max(journal.held_out)]:.3f}, "
                    f"lr {engine.get_lr()[0]:.1e}, {journal.rate:,.0f} tokens/s, "
                    f"peak {mebibytes(peak_bytes(engine.device))}",
                    refresh=False,
                )
            if look:
                held_out_loss(engine, journal, held_out)
                journal.open()
    return journal


def held_out_loss(engine: shardline.Engine, journal: Journal, held_out: Windows) -> None:
    """Write down the loss on the held-out text, and put it next to the engine's own curves."""
    loss = evaluate(engine, held_out)
    journal.look(engine.global_steps, loss)
    engine.events.emit(Scalars(engine.global_steps, {"held out": loss}))


def mebibytes(count: int) -> str:
    """Write a number of bytes for people."""
    return f"{count / 2**20:,.0f} MiB"


def main() -> None:
    """Train, generate a sample and report."""
    started = time.perf_counter()
    args = arguments()
    config = configure(args)
    corpus = Corpus.python_documentation()

    torch.manual_seed(1234)
    model = GPT(len(corpus.alphabet), **MODEL)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine, _, loader, _ = shardline.initialize(
        model=model,
        model_parameters=model.parameters(),
        training_data=Windows(corpus.train, MODEL["context"]),
        config=config,
    )
    first = engine.global_rank == 0
    if first:
        print(
            f"GPT of {parameters:,} parameters; {len(corpus.train):,} characters to train on, {len(corpus.held_out):,} "
            f"held out; ranks: {engine.world_size} on {engine.device.type}; stage {engine.zero_optimization_stage()}"
        )

    # Side by side, so that each held-out character is asked for once.
    held_out = Windows(corpus.held_out, MODEL["context"], stride=MODEL["context"])
    steps = config["scheduler"]["params"]["total_num_steps"]
    if first and engine.global_steps >= steps:
        print(f"{args.out} holds a run that is finished: --out FOLDER begins another one")
    journal = train(engine, loader, held_out, steps, args)

    peak = torch.tensor(peak_bytes(engine.device), device=engine.device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)

    # Every rank generates the same text: the weights, the prompt and the seed are equal.
    with engine.gathered_parameters():
        symbols = engine.module.generate(corpus.encode("The ").to(engine.device)[None], args.sample)[0]
    if first:
        figures = {
            "parameters": f"{parameters:,}",
            **journal.figures(),
            "peak memory": f"{mebibytes(int(peak))} in training, on the rank with most",
            "wall time": f"{time.perf_counter() - started:.0f} s",
            "loss curves": str(journal.draw(args.out / "loss.png")),
        }
        if args.sample:
            print(f"\n{corpus.decode(symbols)}")
        print(f"\n{table(figures)}")
    engine.destroy()


if __name__ == "__main__":
    main()
