"""Which device a process computes on, and whether its tensors travel there or through the host. No other file decides.

The two functions that decide are pure: tests give them any machine.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from shardline.errors import DisagreementError, LaunchError
from shardline.names import ranks_text

__all__ = [
    "Accelerators",
    "RankDevice",
    "choose_backend",
    "choose_device",
    "device_of",
    "own_backend",
    "sharing",
    "usable",
]

_UNFIT = {"mps": "it has no float64, in which norms are added up, and no statistics of its memory"}
"""Kinds of accelerators on which the engine cannot work, and why."""


@dataclass(frozen=True)
class Accelerators:
    """The accelerators of this machine that a process sees."""

    kind: str = "cpu"
    """Their type in torch's words; ``"cpu"`` where there are none."""
    count: int = 0

    @classmethod
    def seen(cls) -> Accelerators:
        """What torch reports."""
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return cls() if found is None else cls(found.type, torch.accelerator.device_count())


def usable(seen: Accelerators, asked: str | None = None) -> tuple[Accelerators, str | None]:
    """Those of ``seen`` that the engine may use, and a notice where it uses none although there are some.

    Args:
        asked: the device that the user wants, such as "cpu", "cuda" or "cuda:1".

    Raises:
        LaunchError: it is not a device, or not one of this machine.
    """
    wanted = _parse(asked)
    if wanted is not None and wanted.type == "cpu":
        return Accelerators(), None
    if wanted is not None and (wanted.type != seen.kind or (wanted.index or 0) >= seen.count):
        here = f"{seen.count} of the type {seen.kind}" if seen.count else "no accelerator"
        raise LaunchError(
            f"The device {asked!r} was asked for, and torch sees {here}. Leave it out, or ask for the CPU."
        )
    if seen.kind not in _UNFIT:
        return seen, None
    if wanted is not None:
        raise LaunchError(f"The device {asked!r} was asked for, and the engine cannot use it: {_UNFIT[seen.kind]}.")
    return Accelerators(), f"computing on the CPU, not on {seen.kind}: {_UNFIT[seen.kind]}"


def choose_device(
    here: Accelerators,
    local_rank: int,
    local_world_size: int,
    *,
    asked: str | None = None,
    model: torch.device | None = None,
) -> torch.device:
    """The device of one process.

    The device that was asked for comes first. Then the accelerator on which the script has put the model, unless that
    is number 0, where ``.cuda()`` puts the model of every rank. Else local ranks take devices in turn, and share them
    where there are not enough. (A launcher that shows each process one device shows it as number 0.)

    Args:
        here: what may be used.
        model: where all of the model is that is on an accelerator.
    """
    if not here.count:
        return torch.device("cpu")
    wanted = _parse(asked)
    if wanted is not None and wanted.index is not None:
        return wanted
    if model is not None and model.type == here.kind and (model.index or local_world_size == 1):
        return torch.device(here.kind, model.index or 0)
    return torch.device(here.kind, local_rank % here.count)


def _parse(asked: str | None) -> torch.device | None:
    if not asked:
        return None
    try:
        return torch.device(asked)
    except RuntimeError:
        raise LaunchError(
            f'The device {asked!r} was asked for; it must be "cpu" or a type of accelerator such as "cuda".'
        ) from None


def device_of(model: nn.Module) -> torch.device | None:
    """The one accelerator on which parameters and buffers of ``model`` are; None if there are none or several."""
    found = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    found = {device for device in found if device.type not in ("cpu", "meta")}
    return found.pop() if len(found) == 1 else None


@dataclass(frozen=True)
class RankDevice:
    """The device of one rank, as the other ranks need to know it."""

    kind: str
    """The device's type."""
    identity: str
    """The same for two ranks exactly if they share a device; empty for a CPU."""

    @classmethod
    def of(cls, device: torch.device) -> RankDevice:
        if device.type == "cpu":
            return cls("cpu", "")
        properties = torch.get_device_module(device).get_device_properties(device)
        identity = getattr(properties, "uuid", None) or f"{device} of {socket.gethostname()}"
        return cls(device.type, str(identity))


def choose_backend(places: Sequence[RankDevice], group: Mapping[str, str]) -> tuple[str | None, str | None]:
    """The backend of the engine's process groups, and a notice where it is not the fastest.

    Args:
        places: of all ranks, in their order.
        group: backends of the process group that is there, by type of device.

    Returns:
        The backend is ``None`` for the same as in that group.

    Raises:
        DisagreementError: some ranks compute on another type of device than the others.
    """
    kind = places[0].kind
    for rank, place in enumerate(places):
        if place.kind != kind:
            raise DisagreementError(
                f"rank 0 computes on {kind} and rank {rank} on {place.kind}: all ranks need one type of device. "
                f"SHARDLINE_DEVICE, or init_distributed(device=...), chooses it; set the same on every rank."
            )
    shared = sharing(places)
    if shared:
        return "gloo", (
            f"{ranks_text(shared)} share a {kind} device, which {kind}'s own backend does not allow: what ranks send "
            f"goes through host memory and gloo, and the host waits for it. Start one process for each device, or "
            f"compute on the CPU with SHARDLINE_DEVICE=cpu"
        )
    if kind == "cpu":
        return None if "cpu" in group else "gloo", None
    if group.get(kind, "gloo") == "gloo":
        return None if kind in group else "gloo", (
            f"the process group of this job has no backend of {kind}'s own, so what ranks send goes through host "
            f"memory and gloo, and the host waits for it. Have initialize make the group, or give it "
            f"{own_backend(kind)!r}"
        )
    return None, None


def own_backend(kind: str) -> str:
    """The backend of a process group for tensors of one type of device, and of the CPU for what ranks compare."""
    return "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"


def sharing(places: Sequence[RankDevice]) -> list[int]:
    """The ranks that have a device in common with another rank."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, place in enumerate(places):
        if place.kind != "cpu":
            ranks[place.identity].append(rank)
    return sorted(rank for those in ranks.values() if len(those) > 1 for rank in those)
