"""Who this process is: its rank, world, node and device, read from the launcher's environment or the process group."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from shardline.errors import LaunchError, UsageError
from shardline.runtime.device import Accelerators, Place, choose_device, device_of, own_backend, usable
from shardline.runtime.network import (
    LOOPBACK,
    Store,
    interface,
    is_loopback,
    is_loopback_by_name,
    join_store,
    open_store,
)

__all__ = [
    "Topology",
    "accelerators",
    "asked_device",
    "default_backend",
    "discover",
    "fault",
    "init_distributed",
    "listen_on",
    "make_current",
]

logger = logging.getLogger("shardline")

DEFAULT_PORT = 29500
DEFAULT_TIMEOUT = timedelta(minutes=10)

_ABORTING = 10.0  # seconds to wait, after an error, until a backend has ended its collectives
_LETTING_GO = 0.02  # seconds; a thread that waits for the interpreter has it after 5 ms


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


@dataclass(frozen=True)
class _Dialect:
    """The names that one launcher gives to the same five numbers."""

    launcher: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str
    node_rank: str


_DIALECTS = (
    _Dialect("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
    # The variables of the *step*: only srun sets them. A batch script's own shell has SLURM_NTASKS too, yet is alone.
    _Dialect("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE", "SLURM_NODEID"),
    _Dialect(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "OMPI_COMM_WORLD_NODE_RANK",
    ),
)


@dataclass(frozen=True)
class _Place:
    """What the environment says about this process; None where it says nothing."""

    launcher: str | None = None
    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    local_world_size: int | None = None
    node_rank: int | None = None


def fault() -> str | None:
    """Where a test wants a process to die, as ``"<point>@<rank>"``: see ``shardline.checkpoint.format.faults``."""
    return os.environ.get("SHARDLINE_FAULT")


def _read_environment(env: Mapping[str, str]) -> _Place:
    for names in _DIALECTS:
        present = [name for name in (names.rank, names.world_size) if name in env]
        if not present:
            continue
        if len(present) == 1:
            if names.launcher != "torchrun":  # those variables also leak into shells that start nothing
                continue
            missing = names.world_size if present[0] == names.rank else names.rank
            raise LaunchError(
                f"The environment has {present[0]}={env[present[0]]} but no {missing}. "
                f"Start the script with `shardline run` or torchrun, or unset {present[0]} to run one process alone."
            )
        place = _Place(
            names.launcher,
            _integer(env, names.rank),
            _integer(env, names.world_size),
            _integer(env, names.local_rank) if names.local_rank in env else None,
            _integer(env, names.local_world_size) if names.local_world_size in env else None,
            _integer(env, names.node_rank) if names.node_rank in env else None,
        )
        if not 0 <= place.rank < place.world_size:
            raise LaunchError(
                f"The environment has {names.rank}={place.rank} and {names.world_size}={place.world_size}; "
                f"a rank is at least 0 and below the world size."
            )
        return place
    return _Place(local_rank=_integer(env, "LOCAL_RANK") if "LOCAL_RANK" in env else None)


def _integer(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise LaunchError(f"The environment variable {name} is {env[name]!r}; it must be an integer.") from None


def asked_device() -> str | None:
    """What the user wants to compute on, of the environment's SHARDLINE_DEVICE: "cpu", "cuda", "cuda:1"."""
    return os.environ.get("SHARDLINE_DEVICE") or None


def accelerators() -> Accelerators:
    """The accelerators that the engine may use here.

    Raises:
        LaunchError: SHARDLINE_DEVICE names a device that is not here.
    """
    return usable(Accelerators.seen(), asked_device())[0]


def discover(local_rank: int | None = None, model: nn.Module | None = None) -> Topology:
    """The place of this process: from the process group if there is one, else from the environment, else alone.

    Variables of torchrun (``shardline run`` sets the same), of Slurm's ``srun`` and of Open MPI are understood.
    ``local_rank`` counts where they do not tell it. Where nothing does, all processes are taken to be on one node (or,
    with accelerators, to fill nodes in order of rank, one process for each device).

    Args:
        model: what will be trained: where it is counts, see :func:`shardline.runtime.device.choose_device`.

    Raises:
        LaunchError: the environment contradicts itself, or asks for a device that is not here.
    """
    place = _read_environment(os.environ)
    if dist.is_initialized():
        return _locate(place, dist.get_rank(), dist.get_world_size(), local_rank, model)
    return _locate(place, place.rank, place.world_size, local_rank, model)


def _locate(
    place: _Place, rank: int, world_size: int, local_rank: int | None = None, model: nn.Module | None = None
) -> Topology:
    asked = asked_device()
    here, notice = usable(Accelerators.seen(), asked)
    local_world_size = place.local_world_size or min(world_size, here.count or world_size)
    if place.local_rank is not None:  # a script's own option often has 0 as its default, on every rank
        local_rank = place.local_rank
    elif local_rank is None or local_rank < 0:  # -1 is argparse's customary "not given"
        local_rank = rank % local_world_size
    node_rank = rank // local_world_size if place.node_rank is None else place.node_rank
    put = None if model is None else device_of(model)
    return Topology(
        rank,
        world_size,
        local_rank,
        local_world_size,
        node_rank,
        choose_device(here, local_rank, local_world_size, asked=asked, model=put),
        _group_backend() if dist.is_initialized() else default_backend(),
        notice,
    )


def default_backend() -> str:
    """``gloo`` on CPU; with an accelerator gloo for CPU tensors beside the accelerator's own backend."""
    return own_backend(accelerators().kind)


def _group_backend() -> str:
    config = dist.get_backend_config()
    backends = dict(pair.split(":", 1) for pair in config.split(",") if ":" in pair)
    # "gloo" alone is reported as cpu:gloo,cuda:gloo,...: one word says the same
    return next(iter(backends.values())) if len(set(backends.values())) == 1 else config


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = DEFAULT_PORT,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
    *,
    device: str | None = None,
) -> None:
    """Make the default process group, unless there is one; works under any launcher and without one.

    Without launcher and arguments this is a single process, whose group needs no network. Where all ranks are on
    one host, gloo and NCCL listen on the loopback interface, unless GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME are set.
    On a machine with accelerators this process's device becomes the current one.

    Args:
        dist_backend: backend of the group; the default is :func:`default_backend`, or gloo where ranks share a device.
        auto_mpi_discovery: whether Open MPI's variables count (they are read like any launcher's; no mpi4py).
        distributed_port: port of rank 0 where the environment has no MASTER_PORT.
        verbose: log one DEBUG line on rank 0.
        timeout: how long a collective may wait for the other ranks; 10 minutes.
        init_method: URL for torch's rendezvous (``tcp://host:port``, ``file:///path``), instead of MASTER_ADDR.
        dist_init_required: False says that the caller has already made a group.
        config: accepted for compatibility, not used.
        rank: overrides the environment where it is not -1.
        world_size: the same.
        device: "cpu", or a type of accelerator such as "cuda", for this process and what it starts: it sets
            SHARDLINE_DEVICE in the environment. The default is the accelerator that is here, if any.

    Raises:
        LaunchError: the device is not here, the environment is incomplete or contradicts itself, or rank 0 cannot
            listen on MASTER_ADDR.
        UsageError: ``dist_init_required=False`` without a process group.
    """
    if device is not None:
        usable(Accelerators.seen(), device)
        os.environ["SHARDLINE_DEVICE"] = device
    _leave_at_exit()
    if dist.is_initialized():
        return
    if dist_init_required is False:
        raise UsageError(
            "dist_init_required=False, but torch.distributed has no process group. "
            "Call torch.distributed.init_process_group() first, or leave dist_init_required out."
        )
    place = _read_environment(os.environ)
    if place.launcher == "mpirun" and not auto_mpi_discovery:
        place = _Place()
    rank = place.rank if rank < 0 else rank
    world_size = place.world_size if world_size < 0 else world_size
    if not 0 <= rank < world_size:
        raise LaunchError(f"Rank {rank} in a world of {world_size}: a rank is at least 0 and below the world size.")

    timeout = timeout or DEFAULT_TIMEOUT
    one_host = _is_on_one_host(os.environ, place, world_size)
    if one_host:
        listen_on(LOOPBACK)
    store: Any
    if world_size == 1 and init_method is None:
        store = dist.HashStore()  # type: ignore[attr-defined]
    elif init_method is not None or "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun's agent already hosts the store that env:// finds
        url = init_method or "env://"
        store, rank, world_size = next(rendezvous(url, rank, world_size, timeout=timeout))
        store.set_timeout(timeout)
        store = dist.PrefixStore("default_pg", store)  # type: ignore[attr-defined]
    else:
        host, port = _master(os.environ, place, distributed_port)
        store = _store(host, port, rank == 0, one_host, timeout)

    here = _locate(_read_environment(os.environ), rank, world_size).device
    make_current(here)
    if world_size > 1:
        store = _store_of_its_own(store, world_size)
    backend = dist_backend or _backend_for_all(store, world_size, here)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    if verbose and rank == 0:
        how = place.launcher or "no launcher"
        logger.debug("process group of %d (%s, %s)", world_size, backend, how)


def _store_of_its_own(store: Any, world_size: int) -> Any:
    """The part of ``store`` for the group that is about to be made. Collective.

    A store may outlive a group whose processes make another one. Groups of one name would then read addresses that
    their peers had in the group before.
    """
    turn = (store.add("shardline/groups", 1) - 1) // world_size
    return dist.PrefixStore(f"group_{turn}", store)  # type: ignore[attr-defined]


def _backend_for_all(store: Any, world_size: int, device: torch.device) -> str:
    """The backend of a new group: gloo for all where two processes have one device. Collective.

    Each process sends a few words, and none reads what all the others said.
    """
    if world_size == 1:
        return own_backend(device.type)
    words = dist.PrefixStore("shardline/devices", store)  # type: ignore[attr-defined]
    place = Place.of(device)
    words.add(place.kind, 1)
    if place.kind != "cpu" and words.add(place.identity, 1) > 1:
        words.set("shared", "yes")
    if words.add("said", 1) == world_size:
        fits = words.add(place.kind, 0) == world_size and not words.check(["shared"])
        words.set("backend", own_backend(place.kind) if fits else "gloo")
    return str(words.get("backend").decode())


def make_current(device: torch.device) -> None:
    """Make ``device`` the one that "cuda" without an index means in this process; nothing on CPU."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)


@cache
def _leave_at_exit() -> None:
    """End the process groups before the interpreter is torn down.

    A thread of gloo that lets go of a tensor needs the interpreter. One that waits for it while the interpreter is torn
    down ends the process with SIGABRT.
    """
    atexit.register(_leave)


def _leave() -> None:
    if getattr(sys, "last_value", None) is not None:
        _abandon()
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    # The threads of a group end with the last reference to it. This module, which torch's compiler imports, keeps one
    # to the default group of that time: in the defaults of its functions, where None means the default group too.
    for function in vars(sys.modules.get("torch.distributed.nn.functional", object)).values():
        if isinstance(function, FunctionType) and function.__defaults__:
            kept = function.__defaults__
            function.__defaults__ = tuple(None if isinstance(each, dist.ProcessGroup) else each for each in kept)
    time.sleep(_LETTING_GO)  # a group that the script still refers to has its threads still


def _abandon() -> None:
    """After an uncaught error: leave without waiting for collectives that other ranks perhaps never join."""
    if not dist.is_initialized():
        return
    # The end of a group of gloo waits for its collectives, and none can be aborted. So these groups have no end: a
    # reference too many keeps them when modules are torn down.
    for group in list(c10d._world.pg_map):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    if _group_backend() != "gloo":
        aborting = threading.Thread(target=c10d._abort_process_group, daemon=True)
        aborting.start()
        aborting.join(_ABORTING)


def listen_on(address: str) -> None:
    """Have gloo listen on the interface of ``address``, one of this machine's, unless the user chose another.

    For a loopback address NCCL as well; between hosts it may know a faster interface than the one of the rendezvous.
    """
    name = interface(address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if is_loopback(address):
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def _is_on_one_host(env: Mapping[str, str], place: _Place, world_size: int) -> bool:
    if place.launcher == "srun":  # its tasks per node are a limit, not a count
        return world_size == 1 or env.get("SLURM_STEP_NUM_NODES") == "1"
    return world_size in (1, place.local_world_size)


def _store(host: str, port: int, is_server: bool, one_host: bool, timeout: timedelta) -> Store:
    if not is_server:
        return join_store(host, port, timeout)
    if one_host or not is_loopback_by_name(host):
        return open_store(host, port, timeout)
    logger.warning(
        "%s is this host's name for itself alone, so the store of the ranks listens on all interfaces. "
        "Set MASTER_ADDR to this host's address in the network, and it listens there alone.",
        host,
    )
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout)  # type: ignore[attr-defined]


def _master(env: Mapping[str, str], place: _Place, default_port: int) -> tuple[str, int]:
    host = env.get("MASTER_ADDR")
    port = _integer(env, "MASTER_PORT") if "MASTER_PORT" in env else None
    if place.launcher == "srun":
        host = host or _first_slurm_host(env.get("SLURM_STEP_NODELIST", ""))
        # the same on all tasks of a step, different for jobs that share a node
        port = port or 20000 + (_integer(env, "SLURM_JOB_ID") if "SLURM_JOB_ID" in env else 0) % 10000
    if not host:
        raise LaunchError(
            "A world of more than one process needs the address of rank 0, but MASTER_ADDR is not set. "
            "Start the script with `shardline run` or torchrun, or set MASTER_ADDR and MASTER_PORT on every process."
        )
    return host, port or default_port


def _first_slurm_host(nodelist: str) -> str | None:
    """``node[003-005,9],other`` -> ``node003``."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodelist)
    return match[1] + (match[2] or "") + (match[3] or "") if match else None
