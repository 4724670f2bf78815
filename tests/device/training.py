"""A small language model, its batches, and one run of it: what the tests of simulated devices share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardline

WIDTH, VOCABULARY = 32, 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        if self.training:
            with torch.no_grad():
                self.seen.add_(1)
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten())


def config(
    stage: int,
    dtype: str = "bf16",
    *,
    offload: bool = False,
    accumulation: int = 1,
    optimizer: str = "AdamW",
    **more: Any,
) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "unit_min_numel": 1, "stage3_param_persistence_threshold": 0}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.5,
        "optimizer": {"type": optimizer, "params": {"lr": 1e-3 if optimizer == "RMSprop" else 1e-2}},
        "zero_optimization": zero,
    }
    if dtype != "fp32":
        made[dtype] = {"enabled": True}
    if dtype == "fp16":
        made[dtype]["initial_scale_power"] = 8
    return made | more


def batch(number: int, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The ``number``-th micro-batch of ``rank``: 4 sequences of 8 tokens, and the same shifted by one."""
    drawn = torch.randint(VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(1000 * number + rank))
    return drawn[:, :-1].contiguous().to(device), drawn[:, 1:].contiguous().to(device)


def make(settings: dict[str, Any], net: type[nn.Module] = Net, **options: Any) -> Any:
    torch.manual_seed(0)
    return shardline.initialize(model=net(), config=settings, **options)[0]


def steps(engine: Any, count: int, first: int = 0) -> list[Tensor]:
    """``count`` micro-steps from batch ``first`` on; their losses, still on the device."""
    losses = []
    for number in range(first, first + count):
        loss = engine(*batch(number, engine.comm.data.rank, engine.device))
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return losses


def train(settings: dict[str, Any], count: int = 4) -> tuple[list[float], float]:
    """The losses of ``count`` micro-steps, and the sum of all weights' magnitudes after them."""
    engine = make(settings)
    losses = [float(loss) for loss in steps(engine, count)]
    total = sum(float(value.double().abs().sum()) for value in engine.full_state_dict().values())
    engine.destroy()
    return losses, total


def train_all(cases: list[dict[str, Any]], count: int = 4) -> list[tuple[list[float], float]]:
    return [train(settings, count) for settings in cases]
