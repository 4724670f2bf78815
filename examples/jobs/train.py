"""A plain loop, one line of which is Shardline's: what all files of this folder start.

torchrun --nproc-per-node 2 examples/jobs/train.py --stage 3
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import shardline


def train(stage: int = 3, steps: int = 20, folder: str | None = None) -> list[float]:
    """The losses of this rank. Goes on from the newest checkpoint in ``folder``, and saves every 10 steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    if folder is not None:
        config["checkpoint"] = {"dir": folder, "every_steps": 10, "resume": "auto", "save_on_sigterm": True}
    engine = shardline.shard(model, optimizer, config)
    losses = []
    for step in range(engine.global_steps, steps):
        draw = torch.Generator().manual_seed(step * engine.world_size + engine.global_rank)  # each rank its own data
        inputs = torch.randn(16, 32, generator=draw).to(engine.device)
        loss = F.mse_loss(model(inputs), inputs.sum(dim=1, keepdim=True))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if engine.global_rank == 0 and losses:
        print(f"rank 0 of {engine.world_size}: loss {losses[0]:.4f} to {losses[-1]:.4f}")
    engine.destroy()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", help="of checkpoints, which all ranks share")
    parser.add_argument("--out", type=Path, help="where each rank writes its losses")
    args = parser.parse_args()
    losses = train(args.stage, args.steps, args.folder)
    if args.out is not None:
        (args.out / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
