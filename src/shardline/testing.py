"""Run a function on several ranks from a test: a time limit, the first failing rank's traceback, nothing left over.

    def gather(value):                      # a module-level function of the test file
        out = [None] * dist.get_world_size()
        dist.all_gather_object(out, value + dist.get_rank())
        return out

    def test_gather():
        assert run_distributed(gather, 2, 10) == [[10, 11], [10, 11]]

Each rank is a process of its own with one thread, a process group over the loopback interface and the variables that
torchrun sets. :class:`Pool` keeps the processes warm, so that a case costs milliseconds. Processes are forked from one
that has imported torch (multiprocessing's forkserver), so that new ones cost milliseconds, too.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib.util
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from types import ModuleType, TracebackType
from typing import IO, Any

import torch
import torch.distributed as dist

from shardline.errors import ShardlineError, UsageError
from shardline.runtime.network import LOOPBACK, interface, join_store, open_store
from shardline.runtime.process_group import DEFAULT_TIMEOUT
from shardline.runtime.topology import default_backend

__all__ = ["Pool", "RankFailed", "RankTimeout", "run_distributed"]

_CHECK_SECONDS = 5.0  # for the collective after each case: all ranks have returned, so milliseconds are normal
_GRACE_SECONDS = 0.3  # after a first failure, for the report of another rank that failed earlier
_STARTUP_SECONDS = 120.0  # importing torch from a cold disk takes tens of seconds


class RankFailed(ShardlineError, RuntimeError):
    """A rank raised or died. ``rank`` says which one, ``error`` is its exception where it could be sent, else None."""

    def __init__(self, message: str, rank: int, error: BaseException | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.error = error


class RankTimeout(RankFailed):
    """The time limit passed; the message holds the stacks of the ranks that were still running."""


def run_distributed(
    fn: Callable[..., Any],
    world_size: int = 2,
    *args: Any,
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Call ``fn(*args, **kwargs)`` on ``world_size`` new processes that form one process group.

    Args:
        fn: a function at the top level of a module, so that the processes can import it.
        timeout: seconds for everything, the start of the processes included.
        env: environment variables for the processes, on top of this one's. They are then new interpreters, in which
            these are set before torch is imported.

    Returns:
        What each rank returned, by rank.

    Raises:
        RankFailed: a rank raised or died; carries the traceback of the rank that failed first.
        RankTimeout: the time limit passed. In every case all processes are gone when the call returns.
    """
    deadline = time.monotonic() + timeout
    with Pool(world_size, env=env, start_timeout=timeout) as pool:
        pool.start()
        return pool._run(fn, args, kwargs, deadline, timeout, check=False)


@dataclass
class _Rank:
    """One process as seen by its pool."""

    process: BaseProcess
    pipe: Connection
    stacks: IO[bytes]
    """A file into which the process writes its Python stacks when asked by SIGUSR1."""

    def kill(self) -> None:
        """End it, and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # it begins a session of its own ...
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)  # ... once it runs

    @property
    def pid(self) -> int:
        if self.process.pid is None:
            raise AssertionError("a rank is a process that was started")
        return self.process.pid


@dataclass(frozen=True)
class _Report:
    """What one rank says at the end of a case."""

    value: Any = None
    failed_at: float | None = None
    """Seconds of the system-wide monotonic clock."""
    traceback: str = ""
    error: bytes | None = None


@dataclass(frozen=True)
class _Case:
    """A function sent by reference, with the file of its module: test modules need not be on ``sys.path``."""

    module: str
    file: str
    call: bytes
    check: bool


@dataclass
class Pool:
    """Warm processes: ``world_size`` ranks that serve one case after the other.

    After each case the ranks make sure that the process group is still in step and that the case left no thread, no
    process and no ``saved_tensors_hooks`` behind. A case that fails or hangs costs the pool its processes; the next one
    starts new ones. Before each case Python and torch are seeded with 0, after it the environment, the working
    directory and torch's default dtype are put back.

    ``env`` and ``preload`` give each process a new interpreter, in which these variables are set before torch is
    imported, and these modules imported before the process group is made, such as one that registers a backend.
    """

    world_size: int
    env: Mapping[str, str] | None = None
    start_timeout: float = _STARTUP_SECONDS
    preload: Sequence[str] = ()
    _ranks: list[_Rank] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise UsageError(f"A pool of {self.world_size} ranks: the world size must be at least 1.")

    @property
    def pids(self) -> list[int]:
        """Process ids by rank; empty before the first case and after :meth:`close`."""
        return [rank.pid for rank in self._ranks]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 60.0, **kwargs: Any) -> list[Any]:
        """Call ``fn(*args, **kwargs)`` on every rank; the same contract as :func:`run_distributed`.

        ``timeout`` is for the case alone, not for starting the processes.
        """
        self.start()
        return self._run(fn, args, kwargs, time.monotonic() + timeout, timeout, check=True)

    def start(self) -> None:
        """Start the processes and their process group, unless they run."""
        if self._ranks and all(rank.process.is_alive() for rank in self._ranks):
            return
        self.close()
        atexit.register(self.close)  # before multiprocessing's own exit, which waits for processes that still run
        try:
            for number in range(self.world_size):
                self._ranks.append(_spawn(number, self.world_size, self.env or {}, self.preload))
            deadline = time.monotonic() + self.start_timeout
            port = self._collect(deadline, self.start_timeout, "the start-up", only=0)[0]
            self._send(port)
            self._collect(deadline, self.start_timeout, "the start-up")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes and everything they started. The pool can be used again."""
        for rank in self._ranks:
            rank.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.pipe.close()
            rank.stacks.close()
        self._ranks = []
        atexit.unregister(self.close)

    def _run(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        deadline: float,
        timeout: float,
        check: bool,
    ) -> list[Any]:
        module = sys.modules[fn.__module__]
        name = getattr(fn, "__qualname__", repr(fn))
        if getattr(module, "__file__", None) is None:
            raise UsageError(f"{name} lives in {fn.__module__!r}, which has no file that other processes could import.")
        try:
            call = pickle.dumps((fn, args, kwargs))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UsageError(
                f"{name} and its arguments cannot be sent to other processes: {error}. "
                f"Use a function at the top level of a module and arguments that can be pickled."
            ) from error
        case = _Case(fn.__module__, os.path.abspath(str(module.__file__)), call, check)
        try:
            self._send(case)
            return self._collect(deadline, timeout, f"{fn.__module__}.{name}")
        except BaseException:  # KeyboardInterrupt included: ranks in the middle of a case serve no other
            self.close()
            raise

    def _send(self, message: object) -> None:
        for rank in self._ranks:
            with contextlib.suppress(BrokenPipeError):  # a dead rank is reported by _collect
                rank.pipe.send(message)

    def _collect(self, deadline: float, timeout: float, what: str, only: int | None = None) -> list[Any]:
        """One report of each rank (or of rank ``only``); raises for the first that failed, died or is late."""
        waiting = dict(enumerate(self._ranks)) if only is None else {only: self._ranks[only]}
        reports: dict[int, _Report] = {}
        died: list[int] = []
        give_up = deadline
        while waiting and time.monotonic() < give_up:
            # in slices, because a dead rank's pipe stays open as long as a process that it forked
            wait([rank.pipe for rank in waiting.values()], timeout=max(0.0, min(0.1, give_up - time.monotonic())))
            for number, rank in list(waiting.items()):
                dead = not rank.process.is_alive()
                try:
                    if rank.pipe.poll():
                        reports[number] = pickle.loads(rank.pipe.recv_bytes())
                        del waiting[number]
                    elif dead:
                        raise EOFError
                except (EOFError, ConnectionResetError):
                    died.append(number)
                    del waiting[number]
            if died or any(report.failed_at is not None for report in reports.values()):
                give_up = min(give_up, time.monotonic() + _GRACE_SECONDS)
        for number in died:  # before those that raised: losing a peer makes the others raise, never the reverse
            self._ranks[number].process.join()
            code = self._ranks[number].process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            raise RankFailed(f"Rank {number} of {self.world_size} {how} while {what} ran.", number)
        failures = [(report.failed_at, n) for n, report in reports.items() if report.failed_at is not None]
        if failures:
            _, number = min(failures)
            report = reports[number]
            error = _unpickle_error(report.error)
            raise RankFailed(
                f"Rank {number} of {self.world_size} failed first while {what} ran:\n\n{report.traceback}",
                number,
                error,
            )
        if waiting:
            late = ", ".join(map(str, waiting))
            raise RankTimeout(
                f"{what} took longer than {timeout:g} s on rank {late} of {self.world_size}.\n\n"
                + "\n".join(f"rank {number} was at\n{_stacks(rank)}" for number, rank in waiting.items()),
                next(iter(waiting)),
            )
        return [reports[number].value for number in sorted(reports)]


def _unpickle_error(data: bytes | None) -> BaseException | None:
    try:
        error = pickle.loads(data) if data else None
    except Exception:  # an exception class with a constructor of its own: its text is in the traceback
        return None
    return error if isinstance(error, BaseException) else None


def _stacks(rank: _Rank) -> str:
    if not rank.process.is_alive():
        return "(ended)"
    os.kill(rank.pid, signal.SIGUSR1)
    size, deadline = -1, time.monotonic() + 2.0
    while time.monotonic() < deadline:  # until the dump is there and has stopped growing
        before, size = size, os.fstat(rank.stacks.fileno()).st_size
        if size > 0 and size == before:
            break
        time.sleep(0.05)
    rank.stacks.seek(0)
    threads = rank.stacks.read().decode(errors="replace").split("\n\n")
    return "\n\n".join(thread for thread in threads if " in _receive\n" not in thread)  # less the inbox below


def _spawn(number: int, world_size: int, env: Mapping[str, str], preload: Sequence[str]) -> _Rank:
    variables = {
        "RANK": number,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": number,
        "LOCAL_WORLD_SIZE": world_size,
        "GROUP_RANK": 0,
        "MASTER_ADDR": LOOPBACK,
        "GLOO_SOCKET_IFNAME": interface(LOOPBACK),
        "OMP_NUM_THREADS": 1,
        **env,
    }
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    context: SpawnContext | ForkServerContext
    if env or preload:
        context = multiprocessing.get_context("spawn")
    else:
        context = multiprocessing.get_context("forkserver")
        tools = [name for name in ("pytest", "hypothesis") if name in sys.modules]
        context.set_forkserver_preload([__name__, "torch._dynamo", "shardline.engine.initialize", *tools])
    ours, theirs = context.Pipe()
    stacks = tempfile.NamedTemporaryFile()  # noqa: SIM115 (closed with the pool)
    process = context.Process(
        target=_serve,
        args=(number, world_size, theirs, stacks.name, environment, list(preload), multiprocessing.get_start_method()),
        name=f"rank {number} of {world_size}",
    )
    with _environment(environment):  # a new interpreter reads it
        process.start()
    theirs.close()
    return _Rank(process, ours, stacks)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(variables: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


# ---------------------------------------------------------------------------------------- inside the ranks' processes


def _serve(
    number: int,
    world_size: int,
    pipe: Connection,
    stacks: str,
    environment: Mapping[str, str],
    preload: Sequence[str],
    start_method: str,
) -> None:
    """Main loop of a rank: join the group, then run cases until the parent closes the pipe."""
    multiprocessing.set_start_method(start_method, force=True)  # a rank's own children start as its parent's would
    os.setsid()  # killing its process group also ends what the rank starts, such as loader workers
    _set_environment(environment)
    faulthandler.register(signal.SIGUSR1, file=open(stacks, "ab"), all_threads=True)  # noqa: SIM115 (as long as it runs)
    torch.set_num_threads(1)
    try:
        for module in preload:
            importlib.import_module(module)
        _join_group(number, world_size, pipe)
    except BaseException as error:
        pipe.send_bytes(pickle.dumps(_failure(error)))
        return
    pipe.send_bytes(pickle.dumps(_Report()))
    cases = _Inbox(pipe)
    # torch's half a million objects: the collection after each case looks at the case's own only. No collection before:
    # it would cost five times as much as the rest of the start, and copy the pages that are shared with other ranks.
    gc.freeze()
    while True:
        case = cases.next()
        report = _run_case(case)
        try:
            # Not pipe.send: with torch imported it would pass tensors by file descriptor, not by value.
            data = pickle.dumps(report)
        except Exception as error:  # a result that cannot be pickled
            data = pickle.dumps(_failure(error))
        pipe.send_bytes(data)


def _join_group(number: int, world_size: int, pipe: Connection) -> None:
    if number == 0:  # port 0: the system chooses a free one, and it is bound from then on
        store = open_store(LOOPBACK, 0, DEFAULT_TIMEOUT)
        pipe.send_bytes(pickle.dumps(_Report(store.port)))
    port = pipe.recv()
    os.environ["MASTER_PORT"] = str(port)
    if number != 0:
        store = join_store(LOOPBACK, port, DEFAULT_TIMEOUT)
    dist.init_process_group(default_backend(), store=store, rank=number, world_size=world_size)


class _Inbox:
    """Receives cases on a thread, so that a rank stuck in a case notices when its parent is gone, and ends."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._case: _Case | None = None
        self._arrived = threading.Semaphore(0)
        threading.Thread(target=self._receive, name="shardline-testing-inbox", daemon=True).start()

    def _receive(self) -> None:
        while True:
            try:
                self._case = self._pipe.recv()
            except (EOFError, OSError):
                os.killpg(os.getpgrp(), signal.SIGKILL)
            self._arrived.release()

    def next(self) -> _Case:
        self._arrived.acquire()
        if self._case is None:
            raise AssertionError("a case was announced and is not there")
        return self._case


def _run_case(case: _Case) -> _Report:
    environment, directory, dtype = dict(os.environ), os.getcwd(), torch.get_default_dtype()
    threads = set(threading.enumerate())
    random.seed(0)
    torch.manual_seed(0)
    try:
        _import_from(case.module, case.file)
        fn, args, kwargs = pickle.loads(case.call)
        value = fn(*args, **kwargs)
        del fn, args, kwargs
        gc.collect()
        if case.check:
            _check_nothing_left(threads)
    except BaseException as error:  # SystemExit too: a case that exits has not returned
        return _failure(error)
    finally:
        _set_environment(environment)
        os.chdir(directory)
        torch.set_default_dtype(dtype)
    return _Report(value)


def _failure(error: BaseException) -> _Report:
    failed_at = time.monotonic()
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__name__") == __name__ and trace.tb_next is not None:
        trace = trace.tb_next  # frames of this file say nothing to the reader
    text = "".join(traceback.format_exception(type(error), error, trace))
    try:
        pickled = pickle.dumps(error)
    except Exception:
        pickled = None
    return _Report(failed_at=failed_at, traceback=text, error=pickled)


def _import_from(name: str, file: str) -> None:
    """Make ``name`` importable as the module in ``file``; ``__main__`` gets the name multiprocessing gives it."""
    loaded = sys.modules.get("__mp_main__" if name == "__main__" else name)
    if loaded is not None and os.path.abspath(str(getattr(loaded, "__file__", ""))) == file:
        return
    alias = "__mp_main__" if name == "__main__" else name
    spec = importlib.util.spec_from_file_location(alias, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be loaded as a module.")
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    if name == "__main__":
        sys.modules["__main__"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[alias]
        raise


def _threads_left(known: set[threading.Thread]) -> list[str]:
    """The names of the threads that are not in ``known`` and do not end.

    An engine's own thread may be the one in which the garbage collector finds the engine. That thread then ends by
    itself, a moment later, and meanwhile a collection in this thread does nothing.
    """
    give_up = time.monotonic() + _CHECK_SECONDS
    while True:
        left = [t.name for t in threading.enumerate() if t not in known and type(t).__name__ != "TMonitor"]  # tqdm's
        if not left or time.monotonic() > give_up:
            return left
        time.sleep(0.02)
        gc.collect()


def _check_nothing_left(threads: set[threading.Thread]) -> None:
    left = _threads_left(threads)
    if left:
        raise RuntimeError(f"The case returned but left threads running: {', '.join(left)}.")
    children = multiprocessing.active_children()
    if children:
        raise RuntimeError(f"The case returned but left processes running: {', '.join(c.name for c in children)}.")
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        raise RuntimeError("The case returned but left saved_tensors_hooks on the thread: autograd notices no edits.")
    if not dist.is_initialized():
        raise RuntimeError("The case returned but destroyed the process group it was given; use run_distributed().")
    total = torch.ones(1)
    work = dist.all_reduce(total, async_op=True)
    if work is None:
        raise AssertionError("an asynchronous all-reduce returned nothing")
    try:
        work.wait(timedelta(seconds=_CHECK_SECONDS))
        in_step = total.item() == dist.get_world_size()
    except RuntimeError:
        in_step = False
    if not in_step:
        raise RuntimeError(
            "The case returned but left the process group out of step: the ranks did not issue the same collectives."
        )
