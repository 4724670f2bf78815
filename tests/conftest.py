"""Fixtures of the whole suite: warm processes for multi-rank cases, and a watch over what a test leaves behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardline.testing import Pool

torch.set_num_threads(1)  # as in the ranks, so that results compare bit by bit

MAX_PROCESSES = 12
"""Warm ranks over all pools; each takes 200 to 300 MB. Worlds 1, 2, 3 and 4 fit together."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--transport", choices=["auto", "gloo"], default="auto", help="how the ranks of all tests talk")
    parser.addoption("--late-verdict", action="store_true", help="steps are judged one step later, as on a device")
    parser.addoption("--arrived", action="store_true", help="what travels is said to have arrived, as on a stream")


def pytest_collection_finish() -> None:
    gc.freeze()  # torch and 5,000 tests: no collection looks at them, nor copies their pages in a forked process


def over_gloo(patch: pytest.MonkeyPatch) -> None:
    """The ranks find no memory to share."""
    import shardline.comm.comm

    patch.setattr(shardline.comm.comm, "attach", lambda *args, **kwargs: None)


def late_verdict(patch: pytest.MonkeyPatch) -> None:
    """The host reads a verdict when the next step ends, as where reading it would wait for a device."""
    from shardline.sharding.boundary import Boundary

    made = Boundary.__init__

    def make(self: Boundary, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.reads_at_once = self.scaler.dynamic

    patch.setattr(Boundary, "__init__", make)


def arrived(patch: pytest.MonkeyPatch) -> None:
    """A stream waits, so that the host never knows whether what travels has arrived."""
    from shardline.comm.transport import AllToAllTransport
    from shardline.sharding.schedule import Schedule

    def wrap(name: str) -> None:
        start = getattr(AllToAllTransport, name)

        def call(self: AllToAllTransport, *args: Any, **kwargs: Any) -> Any:
            work = start(self, *args, **kwargs)
            work._arrived = lambda: True
            return work

        patch.setattr(AllToAllTransport, name, call)

    wrap("gather")
    wrap("reduce")
    made = Schedule.__init__
    patch.setattr(Schedule, "__init__", lambda *args, **kwargs: made(*args, **{**kwargs, "on_host": False}))


WAYS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "gloo": over_gloo, "late": late_verdict, "arrived": arrived
}  # fmt: skip


def run_as(ways: Sequence[str], fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``fn`` on a rank, with other ways to run than a CPU's own."""
    with pytest.MonkeyPatch.context() as patch:
        for way in ways:
            WAYS[way](patch)
        return fn(*args, **kwargs)


class Ranks:
    """Calls a module-level function on every rank of a world, on warm processes that the whole session shares."""

    def __init__(self, *ways: str) -> None:
        self._pools: dict[int, Pool] = {}  # least recently used first
        self.ways = ways

    def __call__(
        self, fn: Callable[..., Any], world_size: int = 2, *args: Any, timeout: float = 120.0, **kwargs: Any
    ) -> list[Any]:
        pool = self._pools.pop(world_size, None) or self.make_pool(world_size)
        while self._pools and sum(self._pools) + world_size > MAX_PROCESSES:
            self._pools.pop(next(iter(self._pools))).close()
        self._pools[world_size] = pool
        if self.ways:
            return pool.run(run_as, self.ways, fn, args, kwargs, timeout=timeout)
        return pool.run(fn, *args, timeout=timeout, **kwargs)

    def make_pool(self, world_size: int) -> Pool:
        return Pool(world_size)

    @property
    def pids(self) -> set[int]:
        return {pid for pool in self._pools.values() for pid in pool.pids}

    def close(self) -> None:
        while self._pools:
            self._pools.popitem()[1].close()


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """``ranks(fn, world_size, *args, timeout=120, **kwargs)`` -> what ``fn`` returned on each rank."""
    option = request.config.getoption
    chosen = {
        "gloo": option("--transport") == "gloo" or option("--arrived"),
        "late": option("--late-verdict"),
        "arrived": option("--arrived"),
    }
    shared = Ranks(*(way for way, wanted in chosen.items() if wanted))
    yield shared
    shared.close()


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves behind a process, thread, environment variable, process group or hook on autograd."""
    before = _state()
    yield
    pools = [
        request.getfixturevalue(name) for name in ("ranks", "cpu_ranks", "one_device") if name in request.fixturenames
    ]
    warm = {pid for shared in pools for pid in shared.pids}
    after = _state()
    left = [
        f"{what}: {sorted(map(str, now ^ was))}"
        for what, was, now in zip(("processes", "threads", "environment"), before, after, strict=True)
        if (now - warm) - was or (what == "environment" and now != was)
    ]
    while torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        left.append("saved_tensors_hooks")
    if dist.is_initialized():
        dist.destroy_process_group()
        left.append("the default process group")
    if torch.get_default_dtype() != torch.float32:
        torch.set_default_dtype(torch.float32)
        left.append("torch's default dtype")
    assert not left, f"the test left behind {'; '.join(left)}"


def _state() -> tuple[set[Any], set[Any], set[Any]]:
    threads = {t for t in threading.enumerate() if type(t).__name__ != "TMonitor"}  # tqdm never ends its own
    # set by pytest, by torch where it imports inductor, and by init_distributed
    passing = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}
    environment = {item for item in os.environ.items() if item[0] not in passing}
    return _children(), threads, environment


def _children() -> set[Any]:
    if sys.platform != "linux":
        return set()
    files = Path("/proc/self/task").glob("*/children")
    own = {int(pid) for file in files for pid in file.read_text().split()}
    return {pid for pid in own if not _serves(pid)} | {rank.pid for rank in multiprocessing.active_children()}


def _serves(pid: int) -> bool:
    """Whether it is one of multiprocessing's own, which stay for the next process that is started."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return b"multiprocessing.forkserver" in command or b"multiprocessing.resource_tracker" in command
