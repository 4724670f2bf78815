"""``deepspeed.utils.groups``: all ranks train one model."""

from __future__ import annotations

import torch.distributed as dist


def _get_data_parallel_group() -> dist.ProcessGroup | None:
    return dist.group.WORLD


def _get_data_parallel_rank() -> int:
    return dist.get_rank()


def _get_data_parallel_world_size() -> int:
    return dist.get_world_size()


def _get_model_parallel_world_size() -> int:
    return 1
