from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import shardline
from shardline.errors import LaunchError, UsageError
from shardline.runtime import topology
from shardline.testing import run_distributed
from tests.sockets import listening

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
}


@pytest.fixture
def environment(monkeypatch):
    """Sets exactly these launcher variables."""

    def set_to(variables):
        for name in list(os.environ):
            if name.startswith(("SLURM_", "OMPI_", "MASTER_", "GLOO_", "NCCL_")) or name in TORCHRUN:
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    set_to({})
    return set_to


def place():
    found = topology.discover()
    return found.rank, found.world_size, found.local_rank, found.local_world_size, found.node_rank


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture
def accelerators(monkeypatch):
    """Pretends that so many CUDA devices are visible."""

    def pretend(count):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)

    return pretend


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0, 1, 0)),
        (TORCHRUN, (5, 8, 1, 4, 1)),
        (SRUN, (3, 4, 1, 2, 1)),
        (MPIRUN, (3, 4, 1, 2, 1)),
        ({**SRUN, **TORCHRUN}, (5, 8, 1, 4, 1)),  # torchrun inside srun
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 1, 2, 0)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1, 0, 1, 0)),  # the shell of a batch script is alone
    ],
    ids=["alone", "torchrun", "srun", "mpirun", "torchrun in srun", "bare torchrun", "sbatch shell"],
)
def test_place_by_launcher(environment, cpu, variables, expected):
    environment(variables)
    assert place() == expected


def test_world_of_one_on_cpu(environment, cpu):
    found = topology.discover()
    assert (found.device, found.backend) == (torch.device("cpu"), "gloo")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_half_an_environment_is_an_error(environment, name):
    environment({name: "1"})
    other = {"RANK": "WORLD_SIZE", "WORLD_SIZE": "RANK"}[name]
    with pytest.raises(LaunchError, match=f"{name}=1 but no {other}"):
        topology.discover()


@pytest.mark.parametrize(("rank", "message"), [("2", "RANK=2 and WORLD_SIZE=2"), ("two", "RANK is 'two'")])
def test_impossible_ranks_are_errors(environment, rank, message):
    environment({"RANK": rank, "WORLD_SIZE": "2"})
    with pytest.raises(LaunchError, match=message):
        topology.discover()


def test_device_follows_the_local_rank(environment, accelerators):
    accelerators(4)
    environment(TORCHRUN)
    assert topology.discover().device == torch.device("cuda", 1)
    assert topology.discover(local_rank=3).device == torch.device("cuda", 1)  # 0 is many a script's default
    environment({"RANK": "5", "WORLD_SIZE": "8"})
    assert topology.discover(local_rank=3).device == torch.device("cuda", 3)
    assert topology.discover(local_rank=-1).device == torch.device("cuda", 1)
    assert topology.discover().backend == "cpu:gloo,cuda:nccl"


def test_a_single_visible_device_is_number_zero(environment, accelerators):
    accelerators(1)  # the launcher shows each process its own
    environment(TORCHRUN)
    assert topology.discover().device == torch.device("cuda", 0)


def test_more_processes_than_devices_take_them_in_turn(environment, accelerators):
    accelerators(2)
    environment({**TORCHRUN, "LOCAL_RANK": "3"})
    assert topology.discover().device == torch.device("cuda", 1)


def test_the_environment_chooses_the_device(environment, accelerators, monkeypatch):
    accelerators(4)
    environment(TORCHRUN)
    monkeypatch.setenv("SHARDLINE_DEVICE", "cpu")
    found = topology.discover()
    assert (found.device, found.backend, found.notice) == (torch.device("cpu"), "gloo", None)
    assert topology.accelerators().count == 0 and not shardline.get_accelerator().is_available()
    monkeypatch.setenv("SHARDLINE_DEVICE", "cuda")
    assert topology.discover().device == torch.device("cuda", 1)
    monkeypatch.setenv("SHARDLINE_DEVICE", "cuda:4")
    with pytest.raises(LaunchError, match="'cuda:4' was asked for, and torch sees 4 of the type cuda"):
        topology.discover()


def test_init_distributed_chooses_the_device_for_what_comes(environment, accelerators, monkeypatch):
    accelerators(4)
    monkeypatch.setenv("SHARDLINE_DEVICE", "cuda")  # to be put back
    with pytest.raises(LaunchError, match="'xpu' was asked for"):
        topology.init_distributed(device="xpu")
    assert not dist.is_initialized() and os.environ["SHARDLINE_DEVICE"] == "cuda"
    topology.init_distributed(device="cpu")
    try:
        assert topology.discover().backend == "gloo" and topology.discover().device == torch.device("cpu")
    finally:
        dist.destroy_process_group()
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.pop(name, None)


def test_without_local_variables_nodes_are_filled_in_order(environment, accelerators):
    accelerators(4)
    environment({"RANK": "6", "WORLD_SIZE": "8"})
    assert place() == (6, 8, 2, 4, 1)


def test_init_distributed_alone_needs_no_environment(environment, cpu):
    before = dict(os.environ)
    topology.init_distributed()
    try:
        group = dist.group.WORLD
        topology.init_distributed()  # nothing happens where there is a group
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
        topology.init_distributed(dist_init_required=False)


def test_a_world_needs_an_address(environment, cpu):
    environment({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(LaunchError, match="MASTER_ADDR is not set"):
        topology.init_distributed()


def test_bad_rank_argument(environment):
    with pytest.raises(LaunchError, match="Rank 2 in a world of 2"):
        topology.init_distributed(rank=2, world_size=2)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node[003-005,9],other", "node003"),
        ("node[07,09]", "node07"),
        ("rack[1-2]s", "rack1s"),
        ("a-1,b", "a-1"),
        ("alone", "alone"),
        ("", None),
    ],
)
def test_first_slurm_host(nodelist, host):
    assert topology._first_slurm_host(nodelist) == host


def rejoin(variables):
    """Leaves the group of the test pool and joins again by what the environment says."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ.update({name: value.format(rank=rank, world=world) for name, value in variables.items()})
    topology.init_distributed(timeout=timedelta(seconds=20))
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    found = topology.discover()
    return total.item(), found.rank, found.world_size, found.local_rank


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("variables", "one_host"),
    [
        ({}, True),
        (TORCHRUN, False),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),  # nothing tells
        ({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, True),
        ({**SRUN, "SLURM_NTASKS_PER_NODE": "4"}, False),  # a limit
        ({**SRUN, "SLURM_STEP_NUM_NODES": "1"}, True),
    ],
)
def test_what_is_on_one_host(environment, variables, one_host):
    environment(variables)
    place = topology._read_environment(os.environ)
    assert topology._is_on_one_host(os.environ, place, place.world_size) is one_host


def test_what_listens_where_a_choice_was_made(environment, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    topology.listen_on("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    topology.listen_on("203.0.113.1")  # of no interface: left to gloo
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")


def sockets_after_joining(variables):
    rejoin(variables)
    return sorted({str(address) for address, _ in listening()})


def test_the_store_of_rank_zero_listens_on_its_address_alone():
    variables = {"RANK": "{rank}", "WORLD_SIZE": "{world}", "LOCAL_RANK": "{rank}", "MASTER_ADDR": "127.0.0.2"}
    found = run_distributed(sockets_after_joining, 2, {**variables, "MASTER_PORT": free_port()}, timeout=90)
    assert found == [["127.0.0.1", "127.0.0.2"], ["127.0.0.1"]]  # gloo's; the store's


def test_a_name_that_only_this_host_understands_is_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(topology, "is_loopback_by_name", lambda host: True)
    with caplog.at_level("WARNING"):
        store = topology._store("127.0.0.1", 0, True, False, timedelta(seconds=10))
    assert "the store of the ranks listens on all interfaces" in caplog.text
    assert [address.is_unspecified for address, _ in listening()] == [True]
    del store
    store = topology._store("127.0.0.1", 0, True, True, timedelta(seconds=10))
    assert [address.is_loopback for address, _ in listening()] == [True]
    del store


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_two_processes_find_each_other(launcher):
    names = {
        "torchrun": {"RANK": "{rank}", "WORLD_SIZE": "{world}", "LOCAL_RANK": "{rank}"},
        "srun": {"SLURM_PROCID": "{rank}", "SLURM_STEP_NUM_TASKS": "{world}", "SLURM_LOCALID": "{rank}"},
    }[launcher]
    address = {"MASTER_PORT": free_port()}
    address |= {"MASTER_ADDR": "127.0.0.1"} if launcher == "torchrun" else {"SLURM_STEP_NODELIST": "127.0.0.1"}
    results = run_distributed(rejoin, 2, {**names, **address}, timeout=90)
    assert results == [(3.0, 0, 2, 0), (3.0, 1, 2, 1)]


def in_a_group_of_its_own():
    found = topology.discover()
    return found.rank, found.world_size, found.local_rank, found.backend


def test_an_initialised_group_is_taken_as_it_is(ranks):
    assert ranks(in_a_group_of_its_own, 2) == [(0, 2, 0, "gloo"), (1, 2, 1, "gloo")]


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
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
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
    ["", "engine.destroy(); dist.destroy_process_group()", "raise SystemExit(0)"],
    ids=["nothing destroyed", "destroyed by the script", "exit"],
)
def test_no_thread_of_a_process_group_outlives_what_runs_at_exit(end):
    script = (
        THREADS + "import torch, torch.distributed as dist, shardline\n"
        "dist.init_process_group('gloo')\n" + ENGINES + "dist.all_gather_object([None] * 2, 1)\n" + end
    )
    with two_processes(script) as processes:
        for process in processes:
            out, err = process.communicate(timeout=90)
            assert (process.returncode, out) == (0, "left: []\n"), err


@pytest.mark.parametrize("own", [True, False], ids=["made here", "made by the caller"])
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
        process.wait(timeout=90)
        assert process.returncode == 1
        assert process.stderr.read().rstrip().endswith("ValueError: mine")
        assert peer.poll() is None


@pytest.mark.parametrize("ends", [True, False], ids=["ends", "hangs"])
def test_after_an_uncaught_error_a_backend_that_can_abort_has_a_limited_time_for_it(ends):
    script = (
        "import time, torch.distributed as dist, shardline\n"
        "from shardline.runtime import topology\n"
        "dist.destroy_process_group = lambda *args: time.sleep(600)\n"
        "topology._group_backend = lambda: 'cpu:gloo,cuda:nccl'\n"
        "topology._ABORTING = 0.1\n"
        "topology.c10d._abort_process_group = lambda: print('aborted', flush=True) or time.sleep("
        + ("0" if ends else "600")
        + ")\n"
        "shardline.init_distributed()\n"
        "raise ValueError('mine')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "aborted\n")
    assert done.stderr.rstrip().endswith("ValueError: mine")


def test_each_group_has_its_own_part_of_a_store_that_outlives_it() -> None:
    """Else the second group of one name may read the addresses that its peers had in the first."""
    store = dist.HashStore()
    places = []
    for turn in range(3):
        parts = [topology._store_of_its_own(store, 2) for _ in range(2)]
        parts[0].set("address", str(turn))
        places.append(parts[1].get("address"))
    assert places == [b"0", b"1", b"2"]
    assert not topology._store_of_its_own(store, 2).check(["address"])
