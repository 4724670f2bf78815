from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import shardline
from shardline.errors import LaunchError, UsageError
from shardline.runtime import patience, process_group, topology
from shardline.runtime.patience import Patience
from shardline.testing import run_distributed
from tests.sockets import free_port, listening
from tests.watch.documented import documented


def test_init_distributed_chooses_the_device_for_what_comes(environment, accelerators, monkeypatch):
    accelerators(4)
    monkeypatch.setenv("SHARDLINE_DEVICE", "cuda")  # to be put back
    with pytest.raises(LaunchError, match="'xpu' was asked for"):
        process_group.init_distributed(device="xpu")
    assert not dist.is_initialized() and os.environ["SHARDLINE_DEVICE"] == "cuda"
    process_group.init_distributed(device="cpu")
    try:
        assert topology.discover().backend == "gloo" and topology.discover().device == torch.device("cpu")
    finally:
        dist.destroy_process_group()
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.pop(name, None)


def test_init_distributed_alone_needs_no_environment(environment, cpu):
    before = dict(os.environ)
    process_group.init_distributed()
    try:
        group = dist.group.WORLD
        process_group.init_distributed()  # nothing happens where there is a group
        assert dist.group.WORLD is group
        value = torch.tensor([3.0])
        dist.all_reduce(value)
        assert value.item() == 3.0
        assert topology.discover() == topology.Topology(0, 1, 0, 1, 0, torch.device("cpu"), "gloo")
        assert dict(os.environ) == before | {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    finally:
        dist.destroy_process_group()


def test_dist_init_required_false_without_a_group(environment):
    with pytest.raises(UsageError, match="no process group"):
        process_group.init_distributed(dist_init_required=False)


def test_a_world_needs_an_address(environment, cpu):
    environment({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(LaunchError, match="MASTER_ADDR is not set"):
        process_group.init_distributed()


def test_bad_rank_argument(environment):
    with pytest.raises(LaunchError, match="Rank 2 of 2 processes"):
        process_group.init_distributed(rank=2, world_size=2)


def rejoin(variables):
    """Leaves the group of the test pool and joins again by what the environment says."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ.update({name: value.format(rank=rank, world=world) for name, value in variables.items()})
    process_group.init_distributed(timeout=timedelta(seconds=20))
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    found = topology.discover()
    return total.item(), found.rank, found.world_size, found.local_rank


def sockets_after_joining(variables):
    rejoin(variables)
    return sorted({str(address) for address, _ in listening()})


def test_the_store_of_rank_zero_listens_on_its_address_alone():
    variables = {"RANK": "{rank}", "WORLD_SIZE": "{world}", "LOCAL_RANK": "{rank}", "MASTER_ADDR": "127.0.0.2"}
    found = run_distributed(sockets_after_joining, 2, {**variables, "MASTER_PORT": str(free_port())}, timeout=90)
    assert found == [["127.0.0.1", "127.0.0.2"], ["127.0.0.1"]]  # gloo's; the store's


def test_a_name_that_only_this_host_understands_is_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(process_group, "is_loopback_by_name", lambda host: True)
    limits = timedelta(seconds=10), Patience(10, "timeout", "")
    with caplog.at_level("WARNING"):
        store = process_group._store("127.0.0.1", 0, True, False, *limits)
    assert "the store of the ranks listens on all interfaces" in caplog.text
    assert [address.is_unspecified for address, _ in listening()] == [True]
    del store
    store = process_group._store("127.0.0.1", 0, True, True, *limits)
    assert [address.is_loopback for address, _ in listening()] == [True]
    del store


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_two_processes_find_each_other(launcher):
    names = {
        "torchrun": {"RANK": "{rank}", "WORLD_SIZE": "{world}", "LOCAL_RANK": "{rank}"},
        "srun": {"SLURM_PROCID": "{rank}", "SLURM_STEP_NUM_TASKS": "{world}", "SLURM_LOCALID": "{rank}"},
    }[launcher]
    address = {"MASTER_PORT": str(free_port())}
    address |= {"MASTER_ADDR": "127.0.0.1"} if launcher == "torchrun" else {"SLURM_STEP_NODELIST": "127.0.0.1"}
    results = run_distributed(rejoin, 2, {**names, **address}, timeout=90)
    assert results == [(3.0, 0, 2, 0), (3.0, 1, 2, 1)]


def wait_for_more(world, port):
    """Two processes of a world that has more; and then without rank 0."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    said = io.StringIO()
    found = []
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        patch.setattr(patience, "_WORD_SECONDS", 0.2)
        for rank_here, seconds, place in ((rank, 1.0, port), (rank + 1, 0.6, str(free_port()))):
            os.environ["MASTER_PORT"] = place
            with pytest.raises(LaunchError) as caught:
                process_group.init_distributed(timeout=timedelta(seconds=seconds), rank=rank_here, world_size=world)
            found.append(caught.value.message)
            assert not dist.is_initialized()
    return found, said.getvalue().splitlines()


def test_ranks_that_do_not_come_are_named():
    port = str(free_port())
    (found, lines), (other, silent) = run_distributed(wait_for_more, 2, 4, port, timeout=90)
    absent = "2 of 4 ranks are here: ranks 2, 3 did not come"
    assert f"{absent} in 1 s (init_distributed(timeout=))." in (found[0], other[0])
    assert re.fullmatch(
        rf"shardline: rank 0: {absent} yet; waiting until [\d:]{{8}} \(init_distributed\(timeout=\)\)\.", lines[0]
    ), lines
    assert re.match(
        r"No store of rank 0 answers at 127\.0\.0\.1:\d+ \(Connection refused\) in 0\.6 s \(init_di", found[1]
    )
    assert re.fullmatch(documented("ranks are here"), lines[0])
    assert silent == []


def wait_in_initialize():
    """Rank 1 does not come to ``initialize`` until rank 0 has given up."""
    if dist.get_rank() == 1:
        process_group.rendezvous_store().get("gave up")
        return None
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        patch.setattr(patience, "_WORD_SECONDS", 0.2)
        config = {"train_micro_batch_size_per_gpu": 1, "watchdog": {"timeout_seconds": 1.0}}
        with pytest.raises(LaunchError) as caught:
            shardline.initialize(model=torch.nn.Linear(2, 2), config=config)
    process_group.rendezvous_store().set("gave up", "")
    return caught.value.message, said.getvalue().splitlines()


def test_a_rank_that_does_not_come_to_initialize():
    (message, lines), _ = run_distributed(wait_in_initialize, 2, timeout=90)
    assert message == (
        "1 of 2 ranks is in shardline.initialize(): rank 1 did not come in 1 s (watchdog.timeout_seconds)."
    )
    assert re.fullmatch(documented("in shardline.initialize()"), lines[0]), lines


@pytest.mark.parametrize("own", [True, False], ids=["made here", "made by the caller"])
def test_the_process_group_is_gone_before_the_interpreter_is_torn_down(own):
    script = (
        "import torch.distributed as dist, shardline\n"
        "destroy = dist.destroy_process_group\n"
        "dist.destroy_process_group = lambda *args: print('destroyed', *args) or destroy(*args)\n"
        + ("" if own else "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n")
        + "shardline.init_distributed()\n"
        "shardline.init_distributed()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout == "destroyed\n"


ENGINES = """
for transport in "auto", "gloo":
    engine, *_ = shardline.initialize(model=torch.nn.Linear(2, 2), config={
        "train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "communication_transport": transport})
"""


THREADS = """
import atexit, pathlib
def threads():
    names = [each.read_text().strip() for each in pathlib.Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]
atexit.register(lambda: print("left:", threads()))
"""


@contextlib.contextmanager
def two_processes(script):
    """The processes that run ``script`` as ranks 0 and 1. Their input is open."""
    address = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads")
@pytest.mark.parametrize(
    "end",
    [
        pytest.param("", id="nothing destroyed"),
        pytest.param(
            "engine.destroy(); dist.destroy_process_group()", id="destroyed by the script", marks=pytest.mark.slow
        ),
        pytest.param("raise SystemExit(0)", id="exit", marks=pytest.mark.slow),
    ],
)
def test_no_thread_of_a_process_group_outlives_what_runs_at_exit(end):
    script = (
        THREADS + "import torch, torch.distributed as dist, shardline\n"
        "dist.init_process_group('gloo')\n" + ENGINES + "dist.all_gather_object([None] * 2, 1)\n" + end
    )
    with two_processes(script) as processes:
        for process in processes:
            out, err = process.communicate(timeout=200)
            assert (process.returncode, out) == (0, "left: []\n"), err


@pytest.mark.parametrize(
    "own", [pytest.param(True, id="made here"), pytest.param(False, id="made by the caller", marks=pytest.mark.slow)]
)
def test_after_an_uncaught_error_a_process_ends_though_its_peer_never_joins_a_collective(own):
    script = (
        "import sys, torch, torch.distributed as dist, shardline\n"
        + ("" if own else "dist.init_process_group('gloo')\n")
        + ENGINES
        + "if dist.get_rank():\n"
        "    sys.stdin.read()\n"
        "started = dist.all_reduce(torch.ones(1), async_op=True)\n"
        "raise ValueError('mine')\n"
    )
    with two_processes(script) as (process, peer):
        process.wait(timeout=200)
        assert process.returncode == 1
        assert process.stderr.read().rstrip().endswith("ValueError: mine")
        assert peer.poll() is None


@pytest.mark.parametrize("ends", [True, False], ids=["ends", "hangs"])
def test_after_an_uncaught_error_a_backend_that_can_abort_has_a_limited_time_for_it(ends):
    script = (
        "import time, torch.distributed as dist, shardline\n"
        "from shardline.runtime import process_group\n"
        "dist.destroy_process_group = lambda *args: time.sleep(600)\n"
        "process_group.group_backend = lambda: 'cpu:gloo,cuda:nccl'\n"
        "process_group._ABORT_SECONDS = 0.1\n"
        "process_group.c10d._abort_process_group = lambda: print('aborted', flush=True) or time.sleep("
        + ("0" if ends else "600")
        + ")\n"
        "shardline.init_distributed()\n"
        "raise ValueError('mine')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (1, "aborted\n")
    assert done.stderr.rstrip().endswith("ValueError: mine")


def test_each_group_has_its_own_part_of_a_store_that_outlives_it() -> None:
    """Else the second group of one name may read the addresses that its peers had in the first."""
    store = dist.HashStore()
    places = []
    for turn in range(3):
        parts = [process_group._own_part(store, 2) for _ in range(2)]
        parts[0].set("address", str(turn))
        places.append(parts[1].get("address"))
    assert places == [b"0", b"1", b"2"]
    assert not process_group._own_part(store, 2).check(["address"])
