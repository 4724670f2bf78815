"""Start a script on several processes and report the first failure alone, by torch's elastic agent."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import signal
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from shardline.errors import LaunchError
from shardline.launch.background import background
from shardline.launch.rendezvous import BACKEND, Meeting, NotNeeded, register
from shardline.launch.scratch import scratch_directory
from shardline.runtime.device import Accelerators, usable
from shardline.runtime.ending import GO_ON, recorded_exit
from shardline.runtime.environment import asked_device, let_nodes_change
from shardline.runtime.network import LOOPBACK
from shardline.runtime.process_group import DEFAULT_PORT

__all__ = ["Launch", "launch"]

_MASTER = re.compile(r"(\[(?P<ipv6>[0-9a-fA-F:]+)\]|(?P<host>[^\s:\[\]]+))(?::(?P<port>\d{1,5}))?")
_INTERRUPT_SECONDS = 5.0  # from Ctrl-C until ranks that have not ended are killed: a person waits
_FAILED_SECONDS = 8.0  # from the end of a rank that failed until others that did not end by SIGTERM are killed
_MOST_PROCESSES, _MOST_NODES = 4096, 65536  # more is a slip of the pen, and would take all memory first
_SECRET = "SHARDLINE_SECRET"
_SECRET_BYTES = 16


@dataclass(frozen=True)
class Launch:
    """What to start, and where."""

    script: str
    """Path of a Python file; with ``module`` the name of a module."""
    arguments: tuple[str, ...] = ()
    module: bool = False
    nproc: int | None = None
    """Processes on this node; None: one for each accelerator, else one."""
    device: str | None = None
    """What they compute on: "cpu", or a type of accelerator; None: the accelerator that is here, if any."""
    nnodes: int = 1
    max_nnodes: int | None = None
    """More nodes than ``nnodes`` may come, up to this many, and go again; None: exactly ``nnodes``."""
    node_rank: int = 0
    """Number of this node. Where nodes come and go they get their numbers by themselves."""
    master: str | None = None
    """``HOST`` or ``HOST:PORT`` of node 0, which listens there alone; needed with several nodes. On one node it may be
    left out for a free port of the loopback interface."""
    join_timeout: float = 900.0
    """Seconds to wait for the other nodes."""
    secret_file: Path | None = None
    """Holds the secret of the job, needed where nodes come and go; None: the environment's SHARDLINE_SECRET."""
    log_dir: Path | None = None
    """Where each rank's output goes, as ``rank3.out`` and ``rank3.err``; None: to the terminal."""
    max_restarts: int = 0
    """How often all processes are started again after a failure."""
    grace: float = 600.0
    """Seconds from a SIGTERM or SIGUSR1 until ranks that have not ended are killed: a step and a save must fit in."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that the ranks get in addition to those of this process."""


def launch(job: Launch) -> int:
    """Run the job to its end.

    Output of rank 0 goes straight to the terminal (a progress bar keeps working), that of the others is prefixed with
    ``[rank N]``; with ``log_dir`` everything goes to files. When a rank fails the others are ended, and its traceback
    is the last thing printed.

    Returns:
        The exit code of the rank that failed first, 128 + n where it died of signal n; 0 if none failed. 128 + n also
        where the launcher itself got signal n: it ends all ranks first. ``GO_ON`` where ranks were asked to end, and
        have saved.

    Raises:
        LaunchError: the job cannot be started as described.
    """
    meeting = _check(job)
    os.environ.update(job.environment)
    asked = job.device or asked_device()
    here, _ = usable(Accelerators.seen(), asked)  # what is not here is said once, and not on every rank
    nproc = job.nproc if job.nproc is not None else here.count or _one_process(asked)
    if job.device is not None:
        os.environ["SHARDLINE_DEVICE"] = job.device
    if meeting.nodes[0] < meeting.nodes[1]:
        let_nodes_change(*meeting.nodes)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // nproc)))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # lines of ranks appear when they are written, also in a pipe
            stream.reconfigure(line_buffering=True)
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            # the agent logs every failure and signal; what a user needs is printed once, below
            logging.getLogger(name).setLevel(logging.CRITICAL)
    runner = ["-m", "shardline.launch.runner", *(["-m"] if job.module else []), job.script, *job.arguments]
    with scratch_directory() as scratch:
        return _run(job, meeting, nproc, runner, scratch)


def _run(job: Launch, meeting: Meeting, nproc: int, runner: list[str], scratch: Path) -> int:
    logs = _Logs(scratch, job.log_dir, changing=meeting.nodes[0] < meeting.nodes[1])
    try:
        with _signals(job.grace), _kill_stragglers(logs):
            elastic_launch(_elastic_config(job, meeting, nproc, logs), sys.executable)(*runner)
    except ChildFailedError as error:
        return _say_saved() if logs.have_saved() else _report(error.failures, logs)
    except _Saved:
        return _say_saved()
    except NotNeeded:
        print("shardline run: the job had enough nodes without this one, and has ended.", file=sys.stderr)
    except SignalException as error:
        print(f"\nshardline run: ended by {error.sigval.name}.", file=sys.stderr)
        return _say_saved() if logs.have_saved() else 128 + error.sigval
    return 0


class _Saved(Exception):
    """All ranks were asked to end, and have saved."""


def _say_saved() -> int:
    print(f"shardline run: the ranks have saved; start again to go on (exit code {GO_ON}).", file=sys.stderr)
    return GO_ON


def _check(job: Launch) -> Meeting:
    if not job.module and not os.path.isfile(job.script):
        raise LaunchError(f"There is no script {job.script!r}. Give the path of a Python file, or a module with -m.")
    if job.nproc is not None and not 1 <= job.nproc <= _MOST_PROCESSES:
        raise LaunchError(f"--nproc is {job.nproc}; it must be at least 1 and at most {_MOST_PROCESSES}, or auto.")
    if job.max_restarts < 0:
        raise LaunchError(f"--max-restarts is {job.max_restarts}; it must be at least 0.")
    if not 0 < job.join_timeout < threading.TIMEOUT_MAX:
        raise LaunchError(f"--join-timeout is {job.join_timeout:g}; it must be a number of seconds above 0.")
    most = job.nnodes if job.max_nnodes is None else job.max_nnodes
    if not 1 <= job.nnodes <= most <= _MOST_NODES:
        given = job.nnodes if job.max_nnodes is None else f"{job.nnodes}:{job.max_nnodes}"
        raise LaunchError(
            f"--nnodes is {given}; it must be at least 1 and at most {_MOST_NODES}, and MIN:MAX in this order."
        )
    changing = job.nnodes < most
    if changing and job.node_rank != 0:
        raise LaunchError(f"--node-rank is {job.node_rank}, but with --nnodes {job.nnodes}:{most} nodes get theirs.")
    if not 0 <= job.node_rank < job.nnodes:
        raise LaunchError(
            f"--node-rank is {job.node_rank} and --nnodes is {job.nnodes}: node ranks go from 0 to nnodes - 1."
        )
    if most > 1 and job.master is None:
        raise LaunchError("Several nodes need --master HOST[:PORT], the address of node 0, on every node.")
    if not 0 <= job.grace < threading.TIMEOUT_MAX:
        raise LaunchError(f"--grace is {job.grace:g}; it must be a number of seconds from 0.")
    if job.log_dir is not None:
        _make_writable(job.log_dir)
    host, port = (LOOPBACK, 0) if job.master is None else _address(job.master)
    inherited = os.environ.pop(_SECRET, None)  # neither the ranks nor what they start need it
    secret = _secret(job.secret_file, inherited) if changing else b""
    return Meeting(host, port, (job.nnodes, most), job.node_rank, job.join_timeout, secret)


def _address(master: str) -> tuple[str, int]:
    match = _MASTER.fullmatch(master)
    if match is None or not 1 <= int(match["port"] or DEFAULT_PORT) <= 65535:
        raise LaunchError(
            f"--master is {master!r}; it must be HOST or HOST:PORT, with a port of 1 to 65535 and an IPv6 address in "
            f"brackets."
        )
    return match["ipv6"] or match["host"], int(match["port"] or DEFAULT_PORT)


def _make_writable(log_dir: Path) -> None:
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=log_dir):
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise LaunchError(
            f"Cannot write to --log-dir {log_dir}: {getattr(error, 'strerror', None) or error}."
        ) from None


def _secret(file: Path | None, given: str | None) -> bytes:
    """The secret of the launchers of a job: what the file holds, else what the environment gave."""
    how = "Make one with `(umask 077; openssl rand -hex 32 > FILE)`, the same on every node."
    if file is not None:
        where, secret = f"--secret-file {file}", _read_own(file)
    elif given is not None:
        where, secret = f"{_SECRET} in the environment", given.encode()
    else:
        raise LaunchError(
            f"Nodes that come and go need a secret: --secret-file FILE, or {_SECRET} in the environment. {how}"
        )
    if len(secret.strip()) < _SECRET_BYTES:
        raise LaunchError(f"{where} is shorter than {_SECRET_BYTES} characters. {how}")
    return secret.strip()


def _read_own(file: Path) -> bytes:
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise LaunchError(f"--secret-file {file} is not a file.")
            if status.st_mode & 0o077 or status.st_uid not in (0, os.geteuid()):
                raise LaunchError(f"--secret-file {file} is open to other users. `chmod 600` it, and own it.")
            return opened.read(1 << 16)
    except OSError as error:
        raise LaunchError(f"Cannot read --secret-file {file}: {error.strerror}.") from None


def _one_process(asked: str | None) -> int:
    why = "no accelerator here" if asked is None else f"computing on {asked}"
    print(f"shardline run: {why}, so 1 process; --nproc N starts more.", file=sys.stderr)
    return 1


def _cores() -> int:
    """Cores that this process may use, which a container or a batch system limits."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _elastic_config(job: Launch, meeting: Meeting, nproc: int, logs: LogsSpecs) -> LaunchConfig:
    register()
    config = LaunchConfig(
        min_nodes=meeting.nodes[0],
        max_nodes=meeting.nodes[1],
        nproc_per_node=nproc,
        run_id=BACKEND,  # the same on all nodes
        rdzv_backend=BACKEND,
        rdzv_configs={"meeting": meeting},
        max_restarts=job.max_restarts,
        logs_specs=logs,
        log_line_prefix_template="[rank ${rank}] ",
        signals_to_handle="SIGHUP,SIGQUIT",  # the others are _signals' below
    )
    if hasattr(config, "shutdown_timeout"):  # torch 2.13; the agent kills ranks 30 seconds after a signal otherwise
        config.shutdown_timeout = math.ceil(job.grace) + 30
    return config


class _Logs(LogsSpecs):
    """Where the ranks of one attempt write: error files in a scratch directory, output as :func:`launch` describes.

    Args:
        changing: whether nodes come and go, for whose sake ranks are asked to end, and start again.
    """

    def __init__(self, scratch: Path, log_dir: Path | None, *, changing: bool = False) -> None:
        super().__init__(str(log_dir or scratch))
        self._scratch = scratch
        self._log_dir = log_dir
        self._changing = changing
        self._attempts = self._restarts = 0
        self.ranks: dict[int, int] = {}
        self.error_files: dict[int, Path] = {}

    @property
    def root_log_dir(self) -> str:
        return str(self._root_log_dir)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        attempt = self._attempts
        if attempt > 0:
            self._say_why_again(int(envs[0]["TORCHELASTIC_RESTART_COUNT"]), envs[0]["TORCHELASTIC_MAX_RESTARTS"])
        self._attempts += 1
        self.ranks = ranks = {local: int(env["RANK"]) for local, env in envs.items()}
        suffix = f".attempt{attempt}" if attempt > 0 else ""
        said = self._scratch / f"attempt{attempt}"  # ranks read what others wrote there
        said.mkdir()
        self.error_files = {local: said / f"rank{rank}.json" for local, rank in ranks.items()}
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

    def _say_why_again(self, restarts: int, most: str) -> None:
        if restarts == self._restarts:
            print("shardline run: nodes came or went, so all ranks start again.", file=sys.stderr)
            return
        self._restarts = restarts
        if self.have_saved() and not self._changing:
            raise _Saved
        first = min(self.records().values(), default=None)
        why = first.text.strip().splitlines()[-1] if first else "a process died"
        print(f"shardline run: {why}; restart {restarts} of {most}.", file=sys.stderr)

    def records(self) -> dict[int, _Record]:
        """What ranks of the last attempt that failed said, by local rank."""
        read = {local: _read(file) for local, file in self.error_files.items()}
        return {local: record for local, record in read.items() if record is not None}

    def have_saved(self) -> bool:
        """Whether the ranks of the last attempt ended because they were asked to. All save together, or none does."""
        codes = {record.code for record in self.records().values()}
        return codes == {GO_ON}

    def failed(self) -> bool:
        """Whether a rank of this attempt has failed, and has ended."""
        return sys.platform == "linux" and any(
            record.code != GO_ON and not Path(f"/proc/{_pid_of(self.error_files[local])}").exists()
            for local, record in self.records().items()
        )

    def kill(self) -> None:
        """Kill what is left of this attempt, with all that it started: each rank leads a process group of its own."""
        for file in self.error_files.values():
            with suppress(OSError, ValueError):
                os.killpg(_pid_of(file), signal.SIGKILL)

    def crash(self, local_rank: int) -> str:
        """The Python stacks that faulthandler wrote while the process died of its own signal."""
        with suppress(OSError):
            return Path(f"{self.error_files[local_rank]}.crash").read_text()
        return ""


@dataclass(frozen=True, order=True)
class _Record:
    """What a rank wrote down when it failed by an exception or ``sys.exit``; the least one came first."""

    lost_peer: bool
    """It failed because another rank was gone, so that one failed before, even if it took longer to say so."""
    time: float
    code: int
    """The exit code it was about to end with; the launcher may have ended it by a signal before."""
    text: str
    gone: frozenset[int] = field(compare=False)
    """Process ids of ranks that had ended when this one failed."""


def _read(error_file: Path) -> _Record | None:
    try:
        record = json.loads(error_file.read_text())
        return _Record(
            record["lost_peer"],
            record["time"],
            record["code"],
            record["message"]["message"],
            frozenset(record["gone"]),
        )
    except (OSError, ValueError, LookupError, TypeError):  # none, or one of another kind: torch's decorator writes too
        return None


def _pid_of(error_file: Path) -> int:
    """The process that writes ``error_file``."""
    return int(Path(f"{error_file}.pid").read_text())


def _kill_stragglers(logs: _Logs) -> AbstractContextManager[None]:
    """When a rank has failed the agent ends the others by SIGTERM, for which one that is stopped, or whose script takes
    that signal and hangs, would have half a minute."""

    def watch(over: threading.Event) -> None:
        attempt, begin = logs.error_files, math.inf
        while not over.wait(_FAILED_SECONDS / 16):
            if attempt is not logs.error_files or not logs.failed():
                attempt, begin = logs.error_files, math.inf
            else:
                begin = min(begin, time.monotonic())
            if time.monotonic() - begin > _FAILED_SECONDS:
                logs.kill()

    return background(watch)


@contextmanager
def _signals(grace: float) -> Iterator[None]:
    """On a signal to the launcher: the ranks get it too, and have some seconds; then they are killed."""

    def pass_on(number: int, frame: FrameType | None) -> NoReturn:
        timer = threading.Timer(_INTERRUPT_SECONDS if number == signal.SIGINT else grace, _kill_children)
        timer.daemon = True
        timer.start()
        for name in previous:  # a second Ctrl-C must not interrupt this
            signal.signal(name, signal.SIG_IGN)
        raise SignalException(f"got signal {number}", signal.Signals(number))

    previous = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
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
    by_local_rank = {failure.local_rank: failure for failure in failures.values()}
    records = logs.records()
    first = _first(by_local_rank, records)
    record, failure = records.get(first), by_local_rank.get(first)
    if record is not None:
        first_word = "lost another rank and ended" if record.lost_peer else "failed first"
        code, how, text = record.code, f"{first_word}, with exit code {record.code}", record.text
    else:
        if failure is None:
            raise AssertionError(f"local rank {first} failed first and left neither a record nor an exit code")
        code, how, text = failure.exitcode, f"failed first, with exit code {failure.exitcode}", logs.crash(first)
        if code < 0:
            code, how = 128 - code, f"was killed by {failure.signal_name()}"
            if -failure.exitcode == signal.SIGKILL:
                how += " (often the system's answer to a lack of memory)"
    seen = "" if failure is None else recorded_exit(failure.pid, logs.error_files[first].parent)
    said = [f"shardline run: rank {logs.ranks[first]} {how}.", seen, text]
    print("\n" + "\n\n".join(each.rstrip() for each in said if each), file=sys.stderr)
    return code


def _first(failures: Mapping[int, ProcessFailure], records: Mapping[int, _Record]) -> int:
    """The local rank that failed by itself, before the others and not because of them."""
    # in the order in which the agent noticed them, but what it ended itself, by SIGTERM, last
    silent = [rank for rank in failures if rank not in records]
    silent.sort(key=lambda rank: -failures[rank].exitcode == signal.SIGTERM)
    if not records:
        return silent[0]
    first = min(records, key=lambda rank: records[rank])
    for rank in silent:
        # C libraries abort when a peer is lost; a rank that aborted after that was not the first
        consequence = -failures[rank].exitcode == signal.SIGABRT and not records[first].lost_peer
        if failures[rank].pid in records[first].gone and not consequence:
            return rank
    return first
