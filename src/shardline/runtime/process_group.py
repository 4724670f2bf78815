"""The default process group: how it is made, under any launcher, and how it ends when the process does."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from shardline.errors import LaunchError, UsageError
from shardline.runtime.device import Accelerators, RankDevice, own_backend, usable
from shardline.runtime.ending import end_after_uncaught_errors, has_failed
from shardline.runtime.environment import (
    Launched,
    address_of_rank_zero,
    ask_for_device,
    has_agent_store,
    is_on_one_host,
    listen_on,
    read_launcher,
)
from shardline.runtime.launcher import end_with_the_launcher
from shardline.runtime.network import LOOPBACK, Store, is_loopback_by_name, join_store, open_store
from shardline.runtime.patience import Patience
from shardline.runtime.topology import group_backend, locate

__all__ = ["DEFAULT_PORT", "DEFAULT_TIMEOUT", "init_distributed", "make_current", "meet", "rendezvous_store"]

logger = logging.getLogger("shardline")

DEFAULT_PORT = 29500
DEFAULT_TIMEOUT = timedelta(minutes=10)

_FEW = 16  # ranks to name
_ABORT_SECONDS = 10.0  # after an error, until a backend has ended its collectives
_RELEASE_SECONDS = 0.02  # a thread that waits for the interpreter has it after 5 ms


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
        timeout: how long a collective may wait for the other ranks, and this process for them to come; 10 minutes.
        init_method: URL for torch's rendezvous (``tcp://host:port``, ``file:///path``), instead of MASTER_ADDR.
        dist_init_required: False says that the caller has already made a group.
        config: accepted for compatibility, not used.
        rank: overrides the environment where it is not -1.
        world_size: the same.
        device: "cpu", or a type of accelerator such as "cuda", for this process and what it starts: it sets
            SHARDLINE_DEVICE in the environment. The default is the accelerator that is here, if any.

    Raises:
        LaunchError: the device is not here, the environment is incomplete or contradicts itself, rank 0 cannot listen
            on MASTER_ADDR or does not answer there, or other ranks did not come in time.
        UsageError: ``dist_init_required=False`` without a process group.
    """
    if device is not None:
        usable(Accelerators.seen(), device)
        ask_for_device(device)
    _end_groups_at_exit()
    end_with_the_launcher()
    if dist.is_initialized():
        return
    if dist_init_required is False:
        raise UsageError(
            "dist_init_required=False, but torch.distributed has no process group. "
            "Call torch.distributed.init_process_group() first, or leave dist_init_required out."
        )
    launched = read_launcher()
    if launched.launcher == "mpirun" and not auto_mpi_discovery:
        launched = Launched()
    rank = launched.rank if rank < 0 else rank
    world_size = launched.world_size if world_size < 0 else world_size
    _check_rank(rank, world_size)

    timeout = timeout or DEFAULT_TIMEOUT
    patience = _patience(timeout, rank, launched)
    one_host = is_on_one_host(launched, world_size)
    if one_host:
        listen_on(LOOPBACK)
    store: Any
    if world_size == 1 and init_method is None:
        store = dist.HashStore()  # type: ignore[attr-defined]
    elif init_method is not None or has_agent_store():
        url = init_method or "env://"
        store, rank, world_size = next(rendezvous(url, rank, world_size, timeout=timeout))
        store.set_timeout(timeout)
        store = dist.PrefixStore("default_pg", store)  # type: ignore[attr-defined]
    else:
        host, port = address_of_rank_zero(launched, distributed_port)
        store = _store(host, port, rank == 0, one_host, timeout, patience)

    here = locate(read_launcher(), rank, world_size).device
    make_current(here)
    if world_size > 1:
        _wait_for_all(store := _own_part(store, world_size), rank, range(world_size), "here", patience)
    backend = dist_backend or _backend_for_all(store, world_size, here)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    if verbose and rank == 0:
        how = launched.launcher or "no launcher"
        logger.debug("process group of %d (%s, %s)", world_size, backend, how)


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise LaunchError(f"Rank {rank} of {world_size} processes: a rank is at least 0 and below the world size.")


def _patience(timeout: timedelta, rank: int, launched: Launched) -> Patience:
    speaks = rank == 0 or launched.local_rank == 0
    return Patience(timeout.total_seconds(), "init_distributed(timeout=)", f"shardline: rank {rank}" if speaks else "")


def rendezvous_store() -> Store:
    """The store of the default process group, over a connection of its own: no call on it waits for another thread's.

    Raises:
        RuntimeError: it does not answer.
    """
    default: Any = c10d._get_default_store()
    store: Store = default.clone()
    return store


def meet(ranks: Sequence[int], timeout: timedelta | None) -> None:
    """Return when all of ``ranks``, this one among them, have come to ``shardline.initialize``. Collective.

    What follows makes process groups, and waits for ranks that do not come without naming them.

    Args:
        timeout: a limit that the configuration sets; None: that of ``init_distributed``.

    Raises:
        LaunchError: some did not come in time; all that came raise it.
    """
    rank, launched = dist.get_rank(), read_launcher()
    try:
        store = rendezvous_store()
    except RuntimeError:  # of a kind that has one connection
        return
    key = "init_distributed(timeout=)" if timeout is None else "watchdog.timeout_seconds"
    speaker = f"shardline: rank {rank}" if rank == ranks[0] or launched.local_rank == 0 else ""
    patience = Patience((timeout or DEFAULT_TIMEOUT).total_seconds(), key, speaker)
    of = hashlib.sha256(repr(list(ranks)).encode()).hexdigest()
    part = _own_part(dist.PrefixStore(f"shardline/meet/{of}", store), len(ranks))  # type: ignore[attr-defined]
    _wait_for_all(part, rank, ranks, "in shardline.initialize()", patience)


def _store(host: str, port: int, is_server: bool, one_host: bool, timeout: timedelta, patience: Patience) -> Store:
    if not is_server:
        return join_store(host, port, timeout, patience, "store of rank 0")
    if one_host or not is_loopback_by_name(host):
        return open_store(host, port, timeout)
    logger.warning(
        "%s is this host's name for itself alone, so the store of the ranks listens on all interfaces. "
        "Set MASTER_ADDR to this host's address in the network, and it listens there alone.",
        host,
    )
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout)  # type: ignore[attr-defined]


def _own_part(store: Any, world_size: int) -> Any:
    """The part of ``store`` for the group that is about to be made. Collective.

    A store may outlive a group whose processes make another one. Groups of one name would then read addresses that
    their peers had in the group before.
    """
    turn = (store.add("shardline/groups", 1) - 1) // world_size
    return dist.PrefixStore(f"group_{turn}", store)  # type: ignore[attr-defined]


def _wait_for_all(store: Any, rank: int, ranks: Sequence[int], where: str, patience: Patience) -> None:
    """Return when all ``ranks`` have joined this part of the store, ``where`` in words. Collective.

    Raises:
        LaunchError: some did not come in time; all that came raise it.
    """
    here = dist.PrefixStore("shardline/here", store)  # type: ignore[attr-defined]
    try:
        here.set(str(rank), "")
        if here.add("count", 1) == len(ranks):
            here.set("all", "")
        while not here.check(["all"]):
            patience.wait(_who_is_absent(here, ranks, where) if patience.wants_words else "")
    except dist.DistError as error:
        raise LaunchError("The store of rank 0, where ranks meet, was closed before all had joined.") from error


def _who_is_absent(here: Any, ranks: Sequence[int], where: str) -> str:
    absent = [str(rank) for rank in ranks if not here.check([str(rank)])]
    count = len(ranks) - len(absent)
    few = ", ".join(absent[:_FEW]) + (", ..." if len(absent) > _FEW else "")
    verb, plural = "is" if count == 1 else "are", "s" * (len(absent) != 1)
    return f"{count} of {len(ranks)} ranks {verb} {where}: rank{plural} {few} did not come"


def _backend_for_all(store: Any, world_size: int, device: torch.device) -> str:
    """The backend of a new group: gloo for all where two processes have one device. Collective.

    Each process writes a few keys, and the last one concludes: none reads what all the others wrote.
    """
    if world_size == 1:
        return own_backend(device.type)
    counts = dist.PrefixStore("shardline/devices", store)  # type: ignore[attr-defined]
    place = RankDevice.of(device)
    counts.add(place.kind, 1)
    if place.kind != "cpu" and counts.add(place.identity, 1) > 1:
        counts.set("shared", "yes")
    if counts.add("written", 1) == world_size:
        fits = counts.add(place.kind, 0) == world_size and not counts.check(["shared"])
        counts.set("backend", own_backend(place.kind) if fits else "gloo")
    return str(counts.get("backend").decode())


def make_current(device: torch.device) -> None:
    """Make ``device`` the one that "cuda" without an index means in this process; nothing on CPU."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)


@cache
def _end_groups_at_exit() -> None:
    """End the process groups before the interpreter is torn down; after an error there is no teardown.

    A thread of gloo that waits for the interpreter while that is torn down aborts the process
    (:mod:`shardline.runtime.ending`).
    """
    end_after_uncaught_errors()
    atexit.register(_end_groups)


def _end_groups() -> None:
    if has_failed():
        _abandon_groups()
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    # The threads of a group end with the last reference to it. This module, which torch's compiler imports, keeps one
    # to the default group of that time: in the defaults of its functions, where None means the default group too.
    for function in vars(sys.modules.get("torch.distributed.nn.functional", object)).values():
        if isinstance(function, FunctionType) and function.__defaults__:
            kept = function.__defaults__
            function.__defaults__ = tuple(None if isinstance(each, dist.ProcessGroup) else each for each in kept)
    time.sleep(_RELEASE_SECONDS)  # a group that the script still refers to has its threads still


def _abandon_groups() -> None:
    """After an error: do not wait for collectives, which other ranks may never join."""
    if not dist.is_initialized():
        return
    # A group of gloo waits for its collectives when it ends, and none can be aborted. One reference too many keeps such
    # groups in a teardown, which is still there after Ctrl-C, or where a script has replaced sys.excepthook.
    for group in list(c10d._world.pg_map):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    if group_backend() != "gloo":
        aborting = threading.Thread(target=c10d._abort_process_group, daemon=True)
        aborting.start()
        aborting.join(_ABORT_SECONDS)
