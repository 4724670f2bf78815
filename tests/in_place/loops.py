"""What the tests in place share: a loop that one line turns from a plain one into a sharded one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

import shardline

Shard = Callable[[nn.Module, Optimizer], Any]
"""The changed line of a loop: it gets the model and the optimizer."""

STAGES = (0, 1, 2, 3)


def config(stage: int, **more: Any) -> dict[str, Any]:
    """Small models shard as large ones do."""
    return {
        "zero_optimization": {"stage": stage, "unit_min_numel": 1, "stage3_param_persistence_threshold": 0},
        **more,
    }


def sharded(stage: int, **more: Any) -> Shard:
    return lambda model, optimizer: shardline.shard(model, optimizer, config(stage, **more))


class Averaged:
    """The plain counterpart: each gradient is averaged over the ranks as it comes, by torch alone."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.full_optimizer_state_dict = model, optimizer.state_dict
        for param in model.parameters():
            dist.broadcast(param.data, 0)
            if param.requires_grad and dist.get_world_size() > 1:
                param.register_hook(self._mean)

    def _mean(self, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    def full_state_dict(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def destroy(self) -> None:
        pass


def averaged(model: nn.Module, optimizer: Optimizer) -> Averaged:
    return Averaged(model, optimizer)


def assert_same(got: Any, want: Any, tolerance: float = 1e-5, path: str = "") -> None:
    """Equal in structure, and each tensor or number within ``tolerance`` of its own size."""
    if isinstance(want, Tensor):
        assert got.shape == want.shape, path
        error = (got.double() - want.double()).norm() / (want.double().norm() + 1e-12)
        assert error <= tolerance or torch.equal(got, want), f"{path}: {float(error):.2e}"
    elif isinstance(want, dict):
        assert list(got) == list(want), path
        for key in want:
            assert_same(got[key], want[key], tolerance, f"{path}.{key}")
    elif isinstance(want, list | tuple):
        assert len(got) == len(want), path
        for i, (one, other) in enumerate(zip(got, want, strict=True)):
            assert_same(one, other, tolerance, f"{path}[{i}]")
    elif isinstance(want, float):
        assert abs(got - want) <= tolerance * max(1.0, abs(want)), f"{path}: {got} and {want}"
    else:
        assert got == want, path
