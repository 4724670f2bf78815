"""Who this process is: its rank, world, node and device, from the process group or else from the environment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from shardline.runtime.device import Accelerators, choose_device, device_of, own_backend, usable
from shardline.runtime.environment import Launched, asked_device, read_launcher

__all__ = ["Topology", "accelerators", "default_backend", "discover", "group_backend", "locate"]


@dataclass(frozen=True)
class Topology:
    """The place of one process in the job."""

    rank: int
    """Number of this process among all, from 0."""
    world_size: int
    """Number of processes of the job."""
    local_rank: int
    """Number of this process on its node, from 0."""
    local_world_size: int
    """Number of processes on this node."""
    node_rank: int
    """Number of this node, from 0."""
    device: torch.device
    """The device this process computes on: its accelerator, else the CPU."""
    backend: str
    """Backend of the process group, by device type where there are several: ``cpu:gloo,cuda:nccl``."""
    notice: str | None = None
    """Why the device is not the accelerator that is here; None where it is, or where the CPU was asked for."""


def accelerators() -> Accelerators:
    """The accelerators that the engine may use here.

    Raises:
        LaunchError: SHARDLINE_DEVICE names a device that is not here.
    """
    return usable(Accelerators.seen(), asked_device())[0]


def discover(local_rank: int | None = None, model: nn.Module | None = None) -> Topology:
    """The place of this process: from the process group if there is one, else from the environment, else alone.

    Variables of torchrun (``shardline run`` sets the same), of Slurm's ``srun`` and of Open MPI are understood.
    ``local_rank`` is used where they do not give it. Where nothing does, all processes are taken to be on one node (or,
    with accelerators, to fill nodes in order of rank, one process for each device).

    Args:
        model: what will be trained; its device matters, see :func:`shardline.runtime.device.choose_device`.

    Raises:
        LaunchError: the environment contradicts itself, or asks for a device that is not here.
    """
    launched = read_launcher(in_group=dist.is_initialized())
    if dist.is_initialized():
        return locate(launched, dist.get_rank(), dist.get_world_size(), local_rank, model)
    return locate(launched, launched.rank, launched.world_size, local_rank, model)


def locate(
    launched: Launched, rank: int, world_size: int, local_rank: int | None = None, model: nn.Module | None = None
) -> Topology:
    """The place of rank ``rank`` of ``world_size``, which ``launched`` may describe further.

    Raises:
        LaunchError: the environment asks for a device that is not here.
    """
    asked = asked_device()
    here, notice = usable(Accelerators.seen(), asked)
    local_world_size = launched.local_world_size or min(world_size, here.count or world_size)
    if launched.local_rank is not None:  # a script's own option often has 0 as its default, on every rank
        local_rank = launched.local_rank
    elif local_rank is None or local_rank < 0:  # -1 is argparse's customary "not given"
        local_rank = rank % local_world_size
    node_rank = rank // local_world_size if launched.node_rank is None else launched.node_rank
    put = None if model is None else device_of(model)
    return Topology(
        rank,
        world_size,
        local_rank,
        local_world_size,
        node_rank,
        choose_device(here, local_rank, local_world_size, asked=asked, model=put),
        group_backend() if dist.is_initialized() else default_backend(),
        notice,
    )


def default_backend() -> str:
    """``gloo`` on CPU; with an accelerator gloo for CPU tensors and the accelerator's own backend."""
    return own_backend(accelerators().kind)


def group_backend() -> str:
    """Backend of the default process group: one word where it is the same for all types of device."""
    config = dist.get_backend_config()
    backends = dict(pair.split(":", 1) for pair in config.split(",") if ":" in pair)
    # "gloo" alone is reported as cpu:gloo,cuda:gloo,...
    return next(iter(backends.values())) if len(set(backends.values())) == 1 else config
