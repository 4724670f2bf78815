"""How a process comes to find Shardline under the name ``deepspeed``, and DeepSpeed's options of a launch."""

from __future__ import annotations

import os
import re
import runpy
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch.distributed.elastic.utils.api import macros

from shardline.compat.deepspeed._version import VERSION
from shardline.compat.deepspeed.finder import PATH
from shardline.errors import LaunchError
from shardline.launch.run import Launch
from shardline.runtime.accelerator import get_accelerator

__all__ = ["ANNOUNCEMENT", "LauncherOptions", "adapt", "run_command"]

ANNOUNCEMENT = (
    f"`import deepspeed` gives Shardline under the names of DeepSpeed {VERSION} in this run (docs/"
    f"migrate-from-deepspeed.md says what differs)."
)


@dataclass(frozen=True)
class LauncherOptions:
    """Options of DeepSpeed's launcher other than those that Shardline's has."""

    include: str | None = None
    """``host:0,1@host``: hosts and slots to use, all slots where none are named."""
    exclude: str | None = None
    """The same for those not to use."""
    hostfile: Path | None = None
    """Lines ``host slots=N``."""
    no_ssh: bool = False
    """This command is started on every host, with ``--node_rank``."""
    no_local_rank: bool = False
    """Scripts do not get ``--local_rank=N``."""
    bind_cores: bool = False
    core_list: str | None = None


def adapt(job: Launch, options: LauncherOptions) -> Launch:
    """``job`` as DeepSpeed's launcher would start it, with the stand-in; says so on stderr.

    Raises:
        LaunchError: the options contradict each other, or name hosts that this command cannot reach.
    """
    environment = {"PYTHONPATH": _path_with_stand_in()}
    if options.hostfile is not None or options.include is not None or options.exclude is not None:
        slots, hosts = _slots(job, options)
        if job.nproc is not None and job.nproc != len(slots):
            raise LaunchError(f"--num_gpus is {job.nproc}, and {len(slots)} slots of this host are chosen.")
        if get_accelerator().is_available():
            environment["CUDA_VISIBLE_DEVICES"] = _visible(slots)
        master = job.master or (next(iter(hosts)) if len(hosts) > 1 else None)
        job = replace(job, nproc=len(slots), nnodes=len(hosts), master=master)
    if options.bind_cores or options.core_list is not None:
        print(
            "shardline run: ranks are not bound to cores; each gets its share of threads (OMP_NUM_THREADS).",
            file=sys.stderr,
        )
    if not options.no_local_rank:
        job = replace(job, arguments=(f"--local_rank={macros.local_rank}", *job.arguments))
    print(f"shardline run: {ANNOUNCEMENT}", file=sys.stderr)
    return replace(job, environment={**job.environment, **environment})


_LINE = re.compile(r"\s*(?P<host>[^\s#]+)\s+slots=(?P<slots>\d+)\s*(#.*)?")
_HERE = ("localhost", "127.0.0.1")


def _slots(job: Launch, options: LauncherOptions) -> tuple[list[int], dict[str, list[int]]]:
    """The slots of this host, and those of all hosts."""
    if options.include is not None and options.exclude is not None:
        raise LaunchError("--include and --exclude are both given. Give one of them.")
    if options.hostfile is None:
        count = job.nproc if options.exclude is None and job.nproc else get_accelerator().device_count()
        hosts = {"localhost": list(range(count))}
    else:
        hosts = _read_hosts(options.hostfile)
    if options.include is not None:
        chosen = _parse(options.include, "--include", hosts)
        hosts = {host: slots or hosts[host] for host, slots in chosen.items()}
    elif options.exclude is not None:
        for host, slots in _parse(options.exclude, "--exclude", hosts).items():
            hosts[host] = [each for each in hosts[host] if slots and each not in slots]
        hosts = {host: slots for host, slots in hosts.items() if slots}
    if not hosts:
        raise LaunchError("--exclude leaves no slot to run on.")
    if len(hosts) > 1 and not options.no_ssh:
        raise LaunchError(
            f"{len(hosts)} hosts are chosen ({', '.join(hosts)}), and this command starts processes on its own host "
            f"alone. Start it on each of them, with --no_ssh --node_rank 0, 1, ... in this order, and --master_addr."
        )
    if not 0 <= job.node_rank < len(hosts):
        raise LaunchError(f"--node_rank is {job.node_rank}, and {len(hosts)} hosts are chosen: it goes from 0.")
    if len(set(map(len, hosts.values()))) > 1:
        raise LaunchError("the chosen hosts have different numbers of slots. Choose as many on each.")
    return list(hosts.values())[job.node_rank], hosts


def _read_hosts(file: Path) -> dict[str, list[int]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise LaunchError(f"Cannot read --hostfile {file}: {error.strerror}.") from None
    hosts: dict[str, list[int]] = {}
    for number, line in enumerate(lines, 1):
        if not line.partition("#")[0].strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None or match["host"] in hosts or int(match["slots"]) < 1:
            raise LaunchError(f"--hostfile {file}, line {number} is {line!r}; each line is HOST slots=N, a host once.")
        hosts[match["host"]] = list(range(int(match["slots"])))
    if not hosts:
        raise LaunchError(f"--hostfile {file} names no host.")
    return hosts


def _parse(text: str, option: str, hosts: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """``worker-0@worker-1:0,2`` by host, empty where all slots are meant."""
    found: dict[str, list[int]] = {}
    for part in text.split("@"):
        host, _, slots = part.partition(":")
        try:
            numbers = [int(each) for each in slots.split(",") if each]
        except ValueError:
            raise LaunchError(f"{option} is {text!r}; it must be HOST[:SLOT,SLOT...][@HOST...].") from None
        known = host in hosts or (host in _HERE and list(hosts) == ["localhost"])
        if not known:
            raise LaunchError(f"{option} names host {host!r}, and there are: {', '.join(hosts)}.")
        host = host if host in hosts else "localhost"
        beyond = [each for each in numbers if each not in hosts[host]]
        if beyond and not (option == "--include" and not get_accelerator().is_available()):
            raise LaunchError(f"{option} names slot {beyond[0]} of {host}, which has {len(hosts[host])}, from 0.")
        found[host] = numbers
    return found


def _visible(slots: list[int]) -> str:
    """Devices of these numbers, among those that this process may use."""
    allowed = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    return ",".join(allowed[each] if each < len(allowed) else str(each) for each in slots)


def _path_with_stand_in() -> str:
    others = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each and each != PATH]
    return os.pathsep.join([PATH, *others])


def run_command(arguments: list[str]) -> None:
    """Run ``[-m] SCRIPT ARGS...`` in this process, as the only rank unless a launcher has said otherwise."""
    is_module = arguments[:1] == ["-m"]
    target, *rest = arguments[1:] if is_module else arguments or [""]
    if not target:
        raise SystemExit("usage: python -m shardline.compat.deepspeed [-m] SCRIPT [ARGS ...]")
    if not is_module and not os.path.isfile(target):
        raise SystemExit(f"There is no script {target!r}. Give the path of a Python file, or a module with -m.")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    if os.environ["RANK"] == "0":
        print(f"shardline: {ANNOUNCEMENT}", file=sys.stderr)
    os.environ["PYTHONPATH"] = _path_with_stand_in()  # for processes that the script starts
    sys.argv = [target, *rest]
    sys.path[0] = os.getcwd() if is_module else os.fspath(Path(target).resolve().parent)
    sys.path.insert(1, PATH)
    if is_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(target, run_name="__main__")
