from __future__ import annotations

import os

import pytest

from shardline.errors import LaunchError
from shardline.runtime.environment import _first_slurm_host, is_on_one_host, listen_on, read_launcher
from tests.runtime.launchers import MPIRUN, SRUN, TORCHRUN


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
    assert _first_slurm_host(nodelist) == host


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
    launched = read_launcher()
    assert is_on_one_host(launched, launched.world_size) is one_host


def test_what_listens_where_a_choice_was_made(environment, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    listen_on("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    listen_on("203.0.113.1")  # of no interface: left to gloo
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_half_an_environment_is_an_error(environment, name):
    environment({name: "1"})
    other = {"RANK": "WORLD_SIZE", "WORLD_SIZE": "RANK"}[name]
    with pytest.raises(LaunchError, match=f"{name}=1 but no {other}"):
        read_launcher()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_process_group_completes_half_an_environment(environment, name):
    """Lightning's own launcher sets WORLD_SIZE and LOCAL_RANK, and makes the group itself."""
    environment({name: "1", "LOCAL_RANK": "1"})
    found = read_launcher(in_group=True)
    assert (found.launcher, found.local_rank) == (None, 1)


@pytest.mark.parametrize(("rank", "message"), [("2", "RANK=2 and WORLD_SIZE=2"), ("two", "RANK is 'two'")])
def test_impossible_ranks_are_errors(environment, rank, message):
    environment({"RANK": rank, "WORLD_SIZE": "2"})
    with pytest.raises(LaunchError, match=message):
        read_launcher()
