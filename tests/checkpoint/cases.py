"""What the checkpoint tests run on ranks: train, save, load, and say what there was, element by element."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import shardline
from shardline.sharding.buffer import flat
from shardline.sharding.fragments import local_fragments
from tests.harness import Setup

WIDTH = 24


class Stats(nn.Module):
    """Running statistics as BatchNorm keeps them, also of a single sample."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0).to(self.mean.dtype), 0.1)
            self.count += 1
        return x - self.mean.to(x.dtype)


class Net(nn.Module):
    """Blocks with dropout, batch statistics, an odd shape, a frozen and a tied parameter."""

    def __init__(self, extra: int = 0) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = Stats()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 37), nn.GELU(), nn.Dropout(0.1), nn.Linear(37, WIDTH))
            for _ in range(3 + extra)
        )
        self.scale = nn.Parameter(torch.ones(()))
        self.fixed = nn.Linear(WIDTH, WIDTH)
        self.fixed.requires_grad_(False)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x))
        for block in self.blocks:
            x = x + block(x) * self.scale
        return self.head(self.fixed(x))


class Noisy(torch.utils.data.Dataset):
    """Samples with random augmentation; each also carries its own number."""

    def __init__(self, size: int = 50) -> None:
        self.data = torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        noise = random.random() + float(numpy.random.rand())
        return self.data[index] + 0.1 * torch.randn(WIDTH) + 0.01 * noise, self.data[index].roll(1), index


def config(stage: int, world: int, dtype: str = "fp32", accumulation: int = 1, batch: int = 12, **more: Any) -> Any:
    """One global batch whatever the world; ``uneven`` lets 12 go by 1 to 4 ranks and two micro-steps."""
    base = Setup(dtype=dtype, accumulation=accumulation).config(stage)
    del base["train_micro_batch_size_per_gpu"]
    return base | {
        "train_batch_size": batch,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 6}},
        "data_loader": {"num_workers": more.pop("workers", 0)},
    } | more  # fmt: skip


def engine(settings: Any, *, extra: int = 0, dropout: bool = True) -> Any:
    torch.manual_seed(0)
    model = Net(extra)
    if not dropout:  # nor statistics of each rank's own
        for module in model.modules():
            if isinstance(module, (nn.Dropout, Stats)):
                module.register_forward_pre_hook(lambda module, args: module.train(False) and None)
    return shardline.initialize(model=model, config=settings, training_data=Noisy())[0]


def train(
    built: Any, steps: int, save: tuple[int, Any] | None = None, **options: Any
) -> tuple[list[float], list[list[int]], list[float]]:
    """Train up to ``steps`` optimizer steps; save after micro-step ``save[0]`` to ``save[1]``.

    Returns the losses, the samples and a random number of each micro-step.
    """
    losses, samples, numbers = [], [], []
    while built.global_steps < steps:
        for x, y, index in built.training_dataloader:
            if save and built.micro_steps == save[0]:
                assert built.save_checkpoint(save[1], client_state={"at": save[0]}, **options)
                save = None
            loss = nn.functional.mse_loss(built(x).float(), y)
            losses.append(loss.item())
            samples.append(index.tolist() if built.training_dataloader.samples else [])
            numbers.append(torch.rand(()).item() + random.random() + float(numpy.random.rand()))
            built.backward(loss)
            built.step()
            if built.global_steps >= steps:
                break
    return losses, samples, numbers


def contents(built: Any) -> dict[str, Any]:
    """This rank's view: whole weights, its pieces of the optimizer state, buffers, counters."""
    pieces: list[Any] = []
    scalars: dict[str, Any] = {}
    if built.optimizer is not None:
        for piece in local_fragments(built.trainables.layout.runs, built.optimizer):
            for key, value in piece.state.items():
                if isinstance(value, Tensor) and value.dim():
                    pieces.append((piece.name, key, piece.start, flat(value).clone()))
                else:
                    scalars[f"{piece.name}/{key}"] = float(value)
    return {
        "weights": built.full_state_dict(),
        "pieces": pieces,
        "scalars": scalars,
        "counters": built.checkpoints._trainer.checkpoint_counters(),
        "scale": built.scaler.scale,
        "lr": built.get_lr(),
        "loader": built.training_dataloader.state_dict(),
    }


def whole(results: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Every state tensor whole, put together from what all ranks said; ranks that hold the same must agree."""
    found: dict[str, Tensor] = {}
    sizes = {name: value.numel() for name, value in results[0]["weights"].items()}
    for result in results:
        for name, key, start, value in result["pieces"]:
            target = found.setdefault(f"{name}/{key}", torch.full((sizes[name],), float("nan"), dtype=value.dtype))
            part = target[start : start + value.numel()]
            assert part.isnan().all() or torch.equal(part, value), f"ranks differ in {key} of {name}"
            part.copy_(value)
    assert not any(value.isnan().any() for value in found.values())
    return found


def save_after(path: str, settings: Any, steps: int, **options: Any) -> dict[str, Any]:
    built = engine(settings)
    train(built, steps)
    built.save_checkpoint(path, **options)
    result = contents(built)
    built.destroy()
    return result


def load_each(paths: Iterable[str], settings: Iterable[Any], **options: Any) -> list[dict[str, Any]]:
    """Load every checkpoint into every layout."""
    results = []
    for path in paths:
        for each in settings:
            built = engine(each)
            found, state = built.load_checkpoint(path, **options)
            assert found is not None and state is not None
            results.append(contents(built))
            built.destroy()
    return results


def resume(path: str | None, settings: Any, steps: int, save: tuple[int, str] | None = None, **options: Any) -> Any:
    """Train on from ``path``; everything that a bitwise comparison needs."""
    built = engine(settings, dropout=options.pop("dropout", True))
    if path is not None:
        assert built.load_checkpoint(path)[0] is not None
    told = train(built, steps, save, **options)
    result = contents(built)
    built.destroy()
    return told, result


def manifest_of(path: str | Path) -> Any:
    import json

    return json.loads((Path(path) / "manifest.json").read_text())
