"""Losses and weights of one training under ``import deepspeed``, whichever that is: ``parity.py OUT CASES``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, CLASSES, MICRO = 24, 7, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def net() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, WIDTH), *(Block() for _ in range(3)), nn.Linear(WIDTH, CLASSES))


def config(stage: int, dtype: str) -> dict[str, Any]:
    adam = {"lr": 2e-3, "betas": [0.9, 0.99], "eps": 1e-4, "weight_decay": 0.01, "torch_adam": True}
    chosen: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "steps_per_print": 10000,
        "optimizer": {"type": "AdamW", "params": adam},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 2e-3, "warmup_num_steps": 5, "total_num_steps": 400},
        },
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    if dtype == "bf16":
        chosen["bf16"] = {"enabled": True}
    if dtype == "fp16":
        chosen["fp16"] = {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 1000}
    return chosen


def train(stage: int, dtype: str, steps: int) -> dict[str, Any]:
    rank, world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    model = net()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=config(stage, dtype)
    )
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    teacher = torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(1))
    draw = torch.Generator().manual_seed(100 + rank)
    losses, norms, total = [], [], 0.0
    for micro in range(2 * steps):
        x = torch.randn(MICRO, 8, generator=draw)
        y = (x @ teacher).argmax(1)
        loss = F.cross_entropy(engine(x.to(half)).float(), y)
        engine.backward(loss)
        mean = loss.detach().float().clone()
        deepspeed.comm.all_reduce(mean)
        total += mean.item() / world / 2
        engine.step()
        if micro % 2:
            losses.append(total)
            norms.append(float(engine.get_global_grad_norm() or 0.0))  # DeepSpeed has none at stage 0 in fp32
            total = 0.0
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        weights = {name: param.detach().double().norm().item() for name, param in model.named_parameters()}
    engine.destroy()
    return {"losses": losses, "norms": norms, "weights": weights, "is_stand_in": hasattr(engine, "trainables")}


def main(out: str, cases: str) -> None:
    torch.set_num_threads(1)
    if hasattr(deepspeed.ops, "__compatible_ops__"):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    deepspeed.init_distributed(dist_backend="gloo")
    found = [train(**case) for case in json.loads(cases)]
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
