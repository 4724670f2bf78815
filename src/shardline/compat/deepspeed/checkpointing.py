"""``deepspeed.checkpointing``: a part of the model that runs again in the backward, by torch's own function."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint as _checkpoint

from shardline.compat.deepspeed import table

__all__ = ["checkpoint", "configure", "is_configured", "non_reentrant_checkpoint", "reset"]

logger = logging.getLogger("shardline")

_configured = False


def configure(
    mpu_: Any,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Note that it was called; what was switched on and has no effect is named."""
    global _configured
    _configured = True
    asked = {
        "partition_activations": partition_activations,
        "contiguous_checkpointing": contiguous_checkpointing,
        "checkpoint_in_cpu": checkpoint_in_cpu,
        "synchronize": synchronize,
        "profile": profile,
    }
    if names := [name for name, value in asked.items() if value]:
        logger.warning("deepspeed.checkpointing.configure: these have no effect here: %s", ", ".join(names))


def is_configured() -> bool:
    """Whether :func:`configure` was called."""
    return _configured


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, computed again in the backward instead of keeping what it made."""
    return _checkpoint(function, *args, use_reentrant=False)


non_reentrant_checkpoint = checkpoint


def reset() -> None:
    """Nothing to do: no buffers are kept."""


def __getattr__(name: str) -> Any:
    return table.resolve("checkpointing", name)
