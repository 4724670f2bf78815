"""Shared memory among the ranks of a test, without an engine or a Comm around it."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from shardline.comm.shared import SharedMemory, attach


def exchange(value):
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def memory_here(timeout: float = 60.0) -> SharedMemory:
    memory = attach(dist.get_rank(), dist.get_world_size(), exchange, timedelta(seconds=timeout), wanted=True)
    assert memory is not None, "these ranks cannot read each other's memory"
    return memory


def leave(memory: SharedMemory) -> None:
    """Close it once nobody needs it any more."""
    dist.barrier()
    memory.close()
