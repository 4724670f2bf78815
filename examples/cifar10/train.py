"""Train the small network of PyTorch's tutorial on CIFAR-10, and tell its accuracy in all and per class.

    shardline run --nproc 2 examples/cifar10/train.py    # or torchrun, or one process: python examples/cifar10/train.py

The network is so small that a step's own cost outweighs its arithmetic: an example of the calls, not of speed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from data import CLASSES, Images, Unavailable, collate, load
from model import Net

import shardline


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train the small network of PyTorch's tutorial on CIFAR-10.")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the 50,000 training images")
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), default="fp32", help="compute dtype")
    parser.add_argument("--stage", type=int, choices=range(4), default=0, help="ZeRO stage")
    parser.add_argument("--log-interval", type=int, default=1000, help="steps between two lines with the running loss")
    parser.add_argument("--data", type=Path, help="folder of the official archive, binary or Python; else downloaded")
    args = parser.parse_args()
    if args.epochs < 1 or args.log_interval < 1:
        parser.error("--epochs and --log-interval are at least 1")
    return args


def configure(dtype: str, stage: int) -> dict[str, Any]:
    """Read the config file and add what the command line says."""
    config: dict[str, Any] = json.loads(Path(__file__).with_name("config.json").read_text())
    config |= {name: {"enabled": name == dtype} for name in ("bf16", "fp16")}
    return config | {"zero_optimization": {"stage": stage}}


class RunningLoss:
    """The mean loss of all ranks since it was last read; adding to it waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, device=device)  # of losses times samples, and of samples

    def add(self, loss: torch.Tensor, samples: int) -> None:
        """Count one micro-batch of this rank."""
        self._sums += torch.stack([loss.detach().float() * samples, torch.full_like(self._sums[1], samples)])

    def read(self) -> float:
        """Return the mean and start over. A collective."""
        dist.all_reduce(self._sums)
        loss, samples = self._sums.tolist()
        self._sums.zero_()
        return loss / samples


@torch.no_grad()
def evaluate(engine: shardline.Engine, images: Images, batch: int = 500) -> torch.Tensor:
    """Return how many images of each class are recognised and how many there are, ``[2, 10]``, over all ranks."""
    engine.eval()
    # As many pieces, so as many forwards, on each rank: at stage 3 a forward is something that all ranks do together.
    world = engine.world_size
    rounds = math.ceil(len(images) / (batch * world))
    counts = torch.zeros(2, len(CLASSES), device=engine.device)
    for piece in torch.arange(len(images)).tensor_split(rounds * world)[engine.global_rank :: world]:
        inputs, labels = collate([images[index] for index in piece.tolist()])
        labels = labels.to(engine.device)
        right = engine(inputs.to(engine.device)).argmax(dim=1) == labels
        counts += torch.stack([labels[right].bincount(minlength=10), labels.bincount(minlength=10)])
    dist.all_reduce(counts)
    engine.train()
    return counts


def share(part: torch.Tensor, whole: torch.Tensor) -> str:
    """Write one count over another as a percentage."""
    return f"{int(part) / int(whole):6.1%}" if whole else "  none"


def main() -> None:
    """Train for the epochs asked for and print the accuracies."""
    args = arguments()
    try:
        data = load(args.data)
    except Unavailable as error:
        sys.exit(str(error))

    torch.manual_seed(1234)
    model = Net()
    engine, _, loader, _ = shardline.initialize(
        model=model,
        model_parameters=model.parameters(),
        training_data=data.train,
        collate_fn=collate,
        config=configure(args.dtype, args.stage),
    )
    first = engine.global_rank == 0
    if first:
        print(
            f"CIFAR-10 in {data.directory}: {len(data.train):,} + {len(data.test):,} images, "
            f"{'checksums as published' if data.official else 'NOT the published files'}\n"
            f"ranks: {engine.world_size} on {engine.device.type}; stage {args.stage}; {args.dtype}"
        )

    started = time.perf_counter()
    running = RunningLoss(engine.device)
    for epoch in range(1, args.epochs + 1):
        for images, labels in loader:
            logits = engine(images.to(engine.device))
            loss = F.cross_entropy(logits.float(), labels.to(engine.device))
            engine.backward(loss)
            engine.step()
            running.add(loss, loader.samples)
            if engine.global_steps % args.log_interval == 0:
                mean = running.read()
                if first:
                    print(f"epoch {epoch:2}  step {engine.global_steps:6,}  loss {mean:.3f}", flush=True)
        right, count = evaluate(engine, data.test)
        if first:
            seconds = time.perf_counter() - started
            print(f"epoch {epoch:2}  test accuracy {share(right.sum(), count.sum())}  {seconds:.0f} s", flush=True)

    if first:
        print(f"\n{engine.global_steps:,} steps, {engine.skipped_steps} of them skipped. Accuracy on the test images:")
        for name, *counts in zip(CLASSES, right, count, strict=True):
            print(f"{name:>8}  {share(*counts)}")
        print(f"{'in all':>8}  {share(right.sum(), count.sum())}")
    engine.destroy()


if __name__ == "__main__":
    main()
