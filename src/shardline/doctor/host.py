"""What is checked on one host: versions, devices and the ways between them, shared memory, ports."""

from __future__ import annotations

import os
import platform
import re
import socket
from importlib import metadata
from pathlib import Path

import torch

from shardline._version import __version__
from shardline.doctor.verdict import FAILED, OK, SLOW
from shardline.runtime.device import Accelerators, usable
from shardline.runtime.environment import asked_device, gloo_interfaces
from shardline.runtime.network import LOOPBACK
from shardline.runtime.topology import discover

__all__ = ["devices", "peer_to_peer", "ports", "shared_memory", "versions"]

_OPTIONAL = ("numpy", "tensorboard", "wandb", "mlflow-skinny", "transformers", "accelerate", "lightning")
_SHM = Path("/dev/shm")
_ROOM = 256 << 20
"""Bytes of shared memory: loader workers and NCCL pass data through it, and containers often have 64 MB."""

Finding = tuple[str, str]


def versions() -> Finding:
    """Python, torch, Shardline, what it needs, and what it can use."""
    try:
        needed = metadata.requires("shardline") or []
    except metadata.PackageNotFoundError:  # run from its sources
        needed = []
    for requirement in needed:
        match = re.match(r"([\w.-]+)>=([\d.]+)$", requirement.strip())
        if match is None:
            continue
        name, least = match.groups()
        found = _version(name)
        if found is None or _numbers(found) < _numbers(least):
            here = f"{name} {found} is installed" if found else f"{name} is not installed"
            return FAILED, f"{here}, and Shardline needs {least} or newer: pip install '{name}>={least}'."
    more = [f"{name} {found}" for name in _OPTIONAL if (found := _version(name))]
    text = f"Shardline {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    return OK, ", ".join([text, *more])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", version.partition("+")[0])]


def devices() -> Finding:
    """The device of this rank computes what the CPU computes."""
    here, notice = usable(Accelerators.seen(), asked_device())
    device = discover().device
    one, other = torch.arange(4096.0, device="cpu").view(64, 64) % 7, torch.eye(64, device="cpu") * 2
    if not torch.equal((one.to(device) @ other.to(device)).cpu(), one * 2):
        return FAILED, f"{device} multiplies two small matrices wrongly. Do not train on it."
    if device.type == "cpu":
        return OK, f"{notice or 'the CPU, no accelerator'}; {_cores()} cores"
    name = getattr(torch.get_device_module(device).get_device_properties(device), "name", device.type)
    return OK, f"{here.count} of the type {here.kind}, {name}"


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peer_to_peer() -> Finding:
    """The device of this rank reaches the memory of the others of this host."""
    here, device = usable(Accelerators.seen(), asked_device())[0], discover().device
    reaches = None if here.count < 2 else getattr(torch.get_device_module(device), "can_device_access_peer", None)
    if reaches is None:
        return OK, "not needed: fewer than two devices" if here.count < 2 else f"torch does not tell for {here.kind}"
    own = device.index or 0
    cut = [other for other in range(here.count) if other != own and not reaches(own, other)]
    if not cut:
        return OK, f"all {here.count} devices reach each other's memory"
    return SLOW, (
        f"{device} does not reach the memory of device {', '.join(map(str, cut))}: what they send goes through the "
        f"host. In a virtual machine or a container, see whether the platform can allow it."
    )


def shared_memory() -> Finding:
    """The room in /dev/shm, and that it can be written."""
    if not _SHM.is_dir():
        return OK, f"there is no {_SHM} on this system"
    status = os.statvfs(_SHM)
    size, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    if not os.access(_SHM, os.W_OK):
        return FAILED, f"{_SHM} cannot be written: loader workers and NCCL need it. Allow it, mode 1777."
    text = f"{_SHM} has {free / 1e6:.0f} of {size / 1e6:.0f} MB free"
    if free < 1 << 20:
        return FAILED, f"{text}: loader workers and NCCL cannot pass data. Remove what is left there."
    if free < _ROOM:
        return SLOW, f"{text}, little for loader workers and NCCL; a container gets more by --shm-size"
    return OK, text


def ports() -> Finding:
    """A socket on the loopback interface can be connected, and the interface that gloo is told to use is here."""
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection((LOOPBACK, port), timeout=5):
                pass
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        return FAILED, f"no connection to {LOOPBACK}: {why}. Ranks of one host meet there; bring `lo` up."
    here = [name for _, name in socket.if_nameindex()]
    asked = gloo_interfaces()
    missing = [name for name in asked if name not in here]
    if missing:
        return FAILED, (
            f"GLOO_SOCKET_IFNAME names the interface {missing[0]!r}, and this host has {', '.join(here)}. "
            f"Correct it, or leave it unset."
        )
    return OK, f"{LOOPBACK} answers; gloo uses {', '.join(asked) or 'the interface of the rendezvous'}"
