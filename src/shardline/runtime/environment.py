"""Reads the environment: the launcher's variables for this process, the address of rank 0, the device to use."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from shardline.errors import LaunchError
from shardline.runtime.network import interface, is_loopback

__all__ = [
    "Launched",
    "address_of_rank_zero",
    "ask_for_device",
    "asked_device",
    "fault",
    "gloo_interfaces",
    "has_agent_store",
    "is_on_one_host",
    "let_nodes_change",
    "listen_on",
    "nodes_may_change",
    "read_launcher",
]


@dataclass(frozen=True)
class _Variables:
    """The names that one launcher gives to the same five numbers."""

    launcher: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str
    node_rank: str


_LAUNCHERS = (
    _Variables("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
    # The variables of the *step*: only srun sets them. The shell of a batch script has SLURM_NTASKS too, and is one
    # process.
    _Variables(
        "srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE", "SLURM_NODEID"
    ),
    _Variables(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "OMPI_COMM_WORLD_NODE_RANK",
    ),
)


@dataclass(frozen=True)
class Launched:
    """What the launcher's variables define of this process; None if they define nothing."""

    launcher: str | None = None
    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    local_world_size: int | None = None
    node_rank: int | None = None


def read_launcher(env: Mapping[str, str] = os.environ, *, in_group: bool = False) -> Launched:
    """Read the variables of torchrun (``shardline run`` sets the same), of Slurm's ``srun`` or of Open MPI.

    Args:
        env: the variables.
        in_group: whether there is a process group, which tells rank and world size better. Who has made it may have
            set one of the two variables alone, as Lightning does.

    Raises:
        LaunchError: the variables are incomplete or contradict themselves.
    """
    for names in _LAUNCHERS:
        present = [name for name in (names.rank, names.world_size) if name in env]
        if not present:
            continue
        if len(present) == 1:
            if in_group or names.launcher != "torchrun":  # the others also leak into shells that start nothing
                continue
            missing = names.world_size if present[0] == names.rank else names.rank
            raise LaunchError(
                f"The environment has {present[0]}={env[present[0]]} but no {missing}. "
                f"Start the script with `shardline run` or torchrun, or unset {present[0]} to run one process alone."
            )
        launched = Launched(
            names.launcher,
            _integer(env, names.rank),
            _integer(env, names.world_size),
            _integer(env, names.local_rank) if names.local_rank in env else None,
            _integer(env, names.local_world_size) if names.local_world_size in env else None,
            _integer(env, names.node_rank) if names.node_rank in env else None,
        )
        if not 0 <= launched.rank < launched.world_size:
            raise LaunchError(
                f"The environment has {names.rank}={launched.rank} and {names.world_size}={launched.world_size}; "
                f"a rank is at least 0 and below the world size."
            )
        return launched
    return Launched(local_rank=_integer(env, "LOCAL_RANK") if "LOCAL_RANK" in env else None)


def is_on_one_host(launched: Launched, world_size: int, env: Mapping[str, str] = os.environ) -> bool:
    """Whether all ``world_size`` processes are known to run on this host."""
    if launched.launcher == "srun":  # its tasks per node are a limit, not a count
        return world_size == 1 or env.get("SLURM_STEP_NUM_NODES") == "1"
    return world_size in (1, launched.local_world_size)


def has_agent_store(env: Mapping[str, str] = os.environ) -> bool:
    """Whether an agent of torchrun started this process: it hosts the store that ``env://`` finds."""
    return "TORCHELASTIC_RUN_ID" in env


def address_of_rank_zero(launched: Launched, default_port: int, env: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port where rank 0 opens the store of the ranks.

    Raises:
        LaunchError: no variable gives the host.
    """
    host = env.get("MASTER_ADDR")
    port = _integer(env, "MASTER_PORT") if "MASTER_PORT" in env else None
    if launched.launcher == "srun":
        host = host or _first_slurm_host(env.get("SLURM_STEP_NODELIST", ""))
        # the same on all tasks of a step, different for jobs that share a node
        port = port or 20000 + (_integer(env, "SLURM_JOB_ID") if "SLURM_JOB_ID" in env else 0) % 10000
    if not host:
        raise LaunchError(
            "A job of more than one process needs the address of rank 0, but MASTER_ADDR is not set. "
            "Start the script with `shardline run` or torchrun, or set MASTER_ADDR and MASTER_PORT on every process."
        )
    return host, port or default_port


def asked_device() -> str | None:
    """The device that the user asks for by SHARDLINE_DEVICE: "cpu", "cuda", "cuda:1"."""
    return os.environ.get("SHARDLINE_DEVICE") or None


def ask_for_device(device: str) -> None:
    """Set SHARDLINE_DEVICE, for this process and those that it starts."""
    os.environ["SHARDLINE_DEVICE"] = device


def let_nodes_change(least: int, most: int) -> None:
    """Say to the processes that this one starts that the job may go on with another number of nodes."""
    os.environ["SHARDLINE_NODES"] = f"{least}:{most}"


def nodes_may_change() -> bool:
    """Whether the launcher said so, for ``shardline run --nnodes MIN:MAX``."""
    return "SHARDLINE_NODES" in os.environ


def listen_on(address: str) -> None:
    """Make gloo listen on the interface of ``address``, one of this machine's, unless the user chose another.

    For a loopback address NCCL as well; between hosts it may know a faster interface than the one of the rendezvous.
    """
    name = interface(address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if is_loopback(address):
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def gloo_interfaces() -> list[str]:
    """The interfaces that the user chose for gloo by GLOO_SOCKET_IFNAME; empty where that is not set."""
    return [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]


def fault() -> str | None:
    """Where a test wants a process to die, as ``"<point>@<rank>"``: see ``shardline.checkpoint.format.faults``."""
    return os.environ.get("SHARDLINE_FAULT")


def _integer(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise LaunchError(f"The environment variable {name} is {env[name]!r}; it must be an integer.") from None


def _first_slurm_host(nodelist: str) -> str | None:
    """``node[003-005,9],other`` -> ``node003``."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodelist)
    return match[1] + (match[2] or "") + (match[3] or "") if match else None
