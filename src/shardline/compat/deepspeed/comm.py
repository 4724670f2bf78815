"""``deepspeed.comm``: torch.distributed, and how a process joins it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from shardline.errors import UsageError
from shardline.runtime.accelerator import get_accelerator
from shardline.runtime.process_group import DEFAULT_PORT
from shardline.runtime.process_group import init_distributed as _init_distributed
from shardline.runtime.topology import discover

__all__ = ["get_local_rank", "init_distributed", "log_summary"]

__path__: list[str] = []

_LEFT_OUT = "left out"


def init_distributed(
    dist_backend: str | None = _LEFT_OUT,
    auto_mpi_discovery: bool = True,
    distributed_port: int = DEFAULT_PORT,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Make the process group, unless there is one; without a launcher that of one process.

    Raises:
        UsageError: for ``dist_backend=None`` on several ranks without an accelerator. Accelerate says so where it has
            found no backend, and then takes every rank for the only one: twice the data, two writers, plausible losses.
    """
    several = not dist.is_initialized() and max(world_size, discover().world_size) > 1
    if dist_backend is None and several and not get_accelerator().is_available():
        raise UsageError(
            "init_distributed(dist_backend=None) on several ranks without an accelerator. Accelerate has found no "
            "backend and would take each rank for the only one. Before anything else, make its state by "
            'accelerate.PartialState(backend="gloo") with ACCELERATE_USE_DEEPSPEED=true in the environment, or give '
            'Accelerator kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")].'
        )
    _init_distributed(
        None if dist_backend == _LEFT_OUT else dist_backend,
        auto_mpi_discovery,
        distributed_port,
        verbose,
        timeout,
        init_method,
        dist_init_required,
        config,
        rank,
        world_size,
    )


def get_local_rank() -> int:
    """The number of this process on its node."""
    return discover().local_rank


def get_world_group() -> dist.ProcessGroup | None:
    """The group of all ranks."""
    return dist.group.WORLD


def log_summary(show_straggler: bool = False) -> None:
    """Nothing: collectives are not logged; ``wall_clock_breakdown`` times the phases."""


def __getattr__(name: str) -> Any:
    return getattr(dist, name)
