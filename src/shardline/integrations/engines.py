"""What the clients do with their engines alike: make one, and tell it which backwards are not the last."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import shardline
from shardline.engine.in_place import InPlaceEngine, shard

__all__ = ["make_engine", "not_last"]


def make_engine(
    module: nn.Module,
    optimizer: Optimizer,
    config: Any,
    *,
    device: torch.device,
    compile: Mapping[str, Any] | None,
) -> InPlaceEngine:
    """Shard ``module`` together with ``optimizer``, where the client computes. Collective.

    Args:
        config: that of :func:`shardline.shard`.
        device: the client's. On the CPU of a machine with accelerators the engine stays on the CPU, too.
        compile: compile block by block, with these arguments of ``torch.compile``.
    """
    if device.type == "cpu" and torch.accelerator.is_available():
        shardline.init_distributed(device="cpu")
    engine = shard(module, optimizer, config)
    if compile is not None:
        engine.compile(**compile)
    return engine


@contextmanager
def not_last(engines: Collection[InPlaceEngine]) -> Iterator[None]:
    """Backwards within are not the last of their windows: stages 0 and 1 reduce later, the others as always."""
    for engine in engines:
        engine.set_gradient_accumulation_boundary(False)
    try:
        yield
    finally:
        for engine in engines:
            engine.set_gradient_accumulation_boundary(None)
