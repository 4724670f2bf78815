from __future__ import annotations

import pytest
import torch

import shardline
from shardline.errors import LaunchError
from shardline.runtime import topology
from tests.runtime.launchers import MPIRUN, SRUN, TORCHRUN


def place():
    found = topology.discover()
    return found.rank, found.world_size, found.local_rank, found.local_world_size, found.node_rank


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


def test_single_process_on_cpu(environment, cpu):
    found = topology.discover()
    assert (found.device, found.backend) == (torch.device("cpu"), "gloo")


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


def test_without_local_variables_nodes_are_filled_in_order(environment, accelerators):
    accelerators(4)
    environment({"RANK": "6", "WORLD_SIZE": "8"})
    assert place() == (6, 8, 2, 4, 1)


def in_a_group_of_its_own():
    found = topology.discover()
    return found.rank, found.world_size, found.local_rank, found.backend


def test_an_initialised_group_is_taken_as_it_is(ranks):
    assert ranks(in_a_group_of_its_own, 2) == [(0, 2, 0, "gloo"), (1, 2, 1, "gloo")]
