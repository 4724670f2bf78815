"""DeepSpeed's logger and what it says on chosen ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch.distributed as dist

from shardline.runtime.accelerator import get_accelerator

__all__ = ["log_dist", "logger", "print_rank_0", "see_memory_usage", "warning_once"]

logger = logging.getLogger("DeepSpeed")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Log on ``ranks``; -1 among them, or none at all, is every rank."""
    if not ranks or -1 in ranks or _rank() in ranks:
        logger.log(level, "[Rank %d] %s", _rank(), message)


def print_rank_0(message: str, debug: bool = False, force: bool = False) -> None:
    """Log on rank 0 where it is wanted."""
    if _rank() == 0 and (debug or force):
        logger.info(message)


@cache
def warning_once(message: str) -> None:
    """Warn of ``message`` the first time."""
    logger.warning(message)


def see_memory_usage(message: str, force: bool = False) -> None:
    """Log the memory that is in use, on rank 0, where ``force`` says so."""
    if force and _rank() == 0:
        device = get_accelerator()
        now, peak = device.memory_allocated(), device.max_memory_allocated()
        logger.info("%s | in use %.2f GB, at most %.2f GB", message, now / 1e9, peak / 1e9)
