"""Start a script on several processes and report the first failure alone, by torch's elastic agent."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from shardline.errors import LaunchError
from shardline.topology import DEFAULT_PORT

__all__ = ["Launch", "launch"]

_MASTER = re.compile(r"(\[[0-9a-fA-F:]+\]|[^\s:\[\]]+)(?::(?P<port>\d+))?")
_INTERRUPT_SECONDS = 5.0  # from Ctrl-C until ranks that have not ended are killed: somebody waits
_RENDEZVOUS_SECONDS = 900  # nodes of a job do not start at once


@dataclass(frozen=True)
class Launch:
    """What to start, and where."""

    script: str
    """Path of a Python file; with ``module`` the name of a module."""
    arguments: tuple[str, ...] = ()
    module: bool = False
    nproc: int | None = None
    """Processes on this node; None: one for each accelerator, else one."""
    nnodes: int = 1
    node_rank: int = 0
    master: str | None = None
    """``HOST`` or ``HOST:PORT`` of node 0; needed with several nodes. On one node a free port is found without."""
    log_dir: Path | None = None
    """Where each rank's output goes, as ``rank3.out`` and ``rank3.err``; None: to the terminal."""
    max_restarts: int = 0
    """How often all processes are started again after a failure."""
    grace: float = 600.0
    """Seconds from a SIGTERM to the launcher until ranks that have not ended are killed: a step and a save."""


def launch(job: Launch) -> int:
    """Run the job to its end.

    Output of rank 0 goes straight to the terminal (a progress bar keeps working), that of the others is prefixed with
    ``[rank N]``; with ``log_dir`` everything goes to files. When a rank fails the others are ended, and its traceback
    is the last thing printed.

    Returns:
        The exit code of the rank that failed first, 128 + n where it died of signal n; 0 if none failed. 128 + n also
        where the launcher itself got signal n: it ends all ranks first.

    Raises:
        LaunchError: the job cannot be started as described.
    """
    _check(job)
    nproc = job.nproc if job.nproc is not None else _one_per_accelerator()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // nproc)))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # lines of ranks appear when they are written, also in a pipe
            stream.reconfigure(line_buffering=True)
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            # the agent narrates every failure and signal; what a user needs of that is printed below, once
            logging.getLogger(name).setLevel(logging.CRITICAL)
    runner = ["-m", "shardline.launch.runner", *(["-m"] if job.module else []), job.script, *job.arguments]
    scratch = Path(tempfile.mkdtemp(prefix="shardline-run-"))
    logs = _Logs(scratch, job.log_dir)
    try:
        with _signals(job.grace):
            elastic_launch(_elastic_config(job, nproc, logs), sys.executable)(*runner)
    except ChildFailedError as error:
        return _report(error.failures, logs)
    except SignalException as error:
        print(f"\nshardline run: ended by {error.sigval.name}.", file=sys.stderr)
        return 128 + error.sigval
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


def _check(job: Launch) -> None:
    if not job.module and not os.path.isfile(job.script):
        raise LaunchError(f"There is no script {job.script!r}. Give the path of a Python file, or a module with -m.")
    if job.nproc is not None and job.nproc < 1:
        raise LaunchError(f"--nproc is {job.nproc}; it must be at least 1, or auto.")
    if not 0 <= job.node_rank < job.nnodes:
        raise LaunchError(
            f"--node-rank is {job.node_rank} and --nnodes is {job.nnodes}: node ranks go from 0 to nnodes - 1."
        )
    if job.nnodes > 1 and job.master is None:
        raise LaunchError(f"--nnodes {job.nnodes} needs --master HOST[:PORT], the address of node 0, on every node.")
    if not 0 <= job.grace < threading.TIMEOUT_MAX:
        raise LaunchError(f"--grace is {job.grace:g}; it must be a number of seconds from 0.")
    if job.master is not None:
        _port_of(job.master)
    if job.log_dir is not None and job.log_dir.exists() and not job.log_dir.is_dir():
        raise LaunchError(f"--log-dir {job.log_dir} exists and is not a directory.")


def _one_per_accelerator() -> int:
    if torch.accelerator.is_available():
        return torch.accelerator.device_count()
    print("shardline run: no accelerator here, so 1 process; --nproc N starts more.", file=sys.stderr)
    return 1


def _cores() -> int:
    """Cores that this process may use, which a container or a batch system limits."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _elastic_config(job: Launch, nproc: int, logs: LogsSpecs) -> LaunchConfig:
    config = LaunchConfig(
        min_nodes=job.nnodes,
        max_nodes=job.nnodes,
        nproc_per_node=nproc,
        run_id="shardline",  # the same on all nodes
        max_restarts=job.max_restarts,
        logs_specs=logs,
        log_line_prefix_template="[rank ${rank}] ",
        signals_to_handle="SIGHUP,SIGQUIT",  # the others are _signals' below
    )
    if hasattr(config, "shutdown_timeout"):  # torch 2.13; the agent kills ranks 30 seconds after a signal otherwise
        config.shutdown_timeout = math.ceil(job.grace) + 30
    if job.master is None:
        config.rdzv_backend, config.rdzv_endpoint = "c10d", "127.0.0.1:0"  # port 0: the system chooses a free one
        config.local_addr = "127.0.0.1"  # the host's own name may not resolve
    else:
        port = "" if _port_of(job.master) else f":{DEFAULT_PORT}"
        config.rdzv_backend, config.rdzv_endpoint = "static", f"{job.master}{port}"
        config.rdzv_configs = {"rank": job.node_rank, "timeout": _RENDEZVOUS_SECONDS}
    return config


def _port_of(master: str) -> str | None:
    match = _MASTER.fullmatch(master)
    if match is None:
        raise LaunchError(f"--master is {master!r}; it must be HOST or HOST:PORT, with an IPv6 address in brackets.")
    return match["port"]


class _Logs(LogsSpecs):
    """Where the ranks of one attempt write: error files in a scratch directory, output as :func:`launch` describes."""

    def __init__(self, scratch: Path, log_dir: Path | None) -> None:
        super().__init__(str(log_dir or scratch))
        self._scratch = scratch
        self._log_dir = log_dir
        self.error_files: dict[int, Path] = {}

    @property
    def root_log_dir(self) -> str:
        return str(self._root_log_dir)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        attempt = int(envs[0]["TORCHELASTIC_RESTART_COUNT"])
        if attempt > 0:
            self._say_why_again(attempt, int(envs[0]["TORCHELASTIC_MAX_RESTARTS"]))
        ranks = {local: int(env["RANK"]) for local, env in envs.items()}
        suffix = f".attempt{attempt}" if attempt > 0 else ""
        self.error_files = {local: self._scratch / f"rank{rank}{suffix}.json" for local, rank in ranks.items()}
        for local, file in self.error_files.items():
            envs[local]["TORCHELASTIC_ERROR_FILE"] = str(file)
        folder = self._log_dir or self._scratch
        folder.mkdir(parents=True, exist_ok=True)
        outputs, errors = (
            {
                # the empty string stands for the terminal
                local: str(folder / f"rank{rank}{suffix}.{kind}") if rank > 0 or self._log_dir else ""
                for local, rank in ranks.items()
            }
            for kind in ("out", "err")
        )
        tail = self._log_dir is None
        return LogsDest(
            stdouts=outputs,
            stderrs=errors,
            tee_stdouts={local: file for local, file in outputs.items() if file and tail},
            tee_stderrs={local: file for local, file in errors.items() if file and tail},
            error_files={local: str(file) for local, file in self.error_files.items()},
        )

    def _say_why_again(self, attempt: int, attempts: int) -> None:
        _, why = min(filter(None, map(_read, self.error_files.values())), default=(0.0, "a process died"))
        print(f"shardline run: {why.strip().splitlines()[-1]}; restart {attempt} of {attempts}.", file=sys.stderr)


def _read(error_file: str | Path) -> tuple[float, str] | None:
    """When a rank failed and what it said; None where it could say nothing."""
    try:
        record = json.loads(Path(error_file).read_text())
    except (OSError, ValueError):
        return None
    return record["time"], record["message"]["message"]


@contextmanager
def _signals(grace: float) -> Iterator[None]:
    """On a signal to the launcher: the ranks get it too, and have some seconds; then they are killed."""

    def pass_on(number: int, frame: FrameType | None) -> NoReturn:
        timer = threading.Timer(grace if number == signal.SIGTERM else _INTERRUPT_SECONDS, _kill_children)
        timer.daemon = True
        timer.start()
        for name in previous:  # a second Ctrl-C must not cut the ending short
            signal.signal(name, signal.SIG_IGN)
        raise SignalException(f"got signal {number}", signal.Signals(number))

    previous = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        for name in previous:
            signal.signal(name, pass_on)
        yield
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


def _kill_children() -> None:
    """Kill this process's children with all that they started; each rank leads a process group of its own."""
    for file in Path("/proc/self/task").glob("*/children"):
        for pid in file.read_text().split():
            with suppress(ProcessLookupError):
                os.killpg(int(pid), signal.SIGKILL)


def _report(failures: dict[int, ProcessFailure], logs: _Logs) -> int:
    """Print the first failure; its exit code."""
    rank = min(failures, key=lambda rank: _happened_at(failures[rank]))
    failure = failures[rank]
    _, text = _read(failure.error_file) or (0.0, _crash(logs.error_files[failure.local_rank]))
    if failure.exitcode < 0:
        code, how = 128 - failure.exitcode, f"was killed by {failure.signal_name()}"
        if -failure.exitcode == signal.SIGKILL:
            how += " (often the system's answer to a lack of memory)"
    else:
        code, how = failure.exitcode, f"failed first, with exit code {failure.exitcode}"
    print(f"\nshardline run: rank {rank} {how}.\n\n{text}".rstrip(), file=sys.stderr)
    return code


def _crash(error_file: Path) -> str:
    """The Python stacks that faulthandler wrote while the process died of its own signal."""
    try:
        return Path(f"{error_file}.crash").read_text()
    except FileNotFoundError:
        return ""


def _happened_at(failure: ProcessFailure) -> tuple[bool, float]:
    """Key to find the failure that caused the others."""
    if record := _read(failure.error_file):
        return False, record[0]
    # A process that died without a word is noticed up to a polling interval later, in whole seconds; its peers raise
    # because it died, never the reverse. SIGTERM is what the agent sends to the others after a failure.
    return -failure.exitcode == signal.SIGTERM, failure.timestamp - 1.0
