"""``deepspeed.utils.groups``: all ranks train one model."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from shardline.errors import UsageError


def _get_data_parallel_group() -> dist.ProcessGroup | None:
    return dist.group.WORLD


def _get_data_parallel_rank() -> int:
    return dist.get_rank()


def _get_data_parallel_world_size() -> int:
    return dist.get_world_size()


def _get_model_parallel_world_size() -> int:
    return 1


def initialize(ep_size: int = 1, mpu: Any = None) -> None:
    """Nothing to do for the one group that there is.

    Raises:
        UsageError: for others.
    """
    if ep_size != 1 or mpu is not None:
        raise UsageError(
            "deepspeed.utils.groups.initialize was given ep_size or mpu. Groups of ranks for experts or for parts of a "
            "model are not offered: leave both out; stage 3 shards all weights over all ranks."
        )
