"""torch.distributed.checkpoint reads a checkpoint, and an export by its own safetensors reader."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from shardline.checkpoint.interchange import Reader
from shardline.cli import main
from shardline.errors import CheckpointError
from tests.checkpoint import cases

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def saved(ranks, tmp_path):
    wanted = ranks(cases.save_after, 2, str(tmp_path), cases.config(3, 2), 2)
    return tmp_path, wanted


def test_dcp_reads_weights_states_and_buffers(saved):
    path, wanted = saved
    weights, states = wanted[0]["weights"], cases.whole(wanted)
    model = cases.Net()
    buffers = dict(model.named_buffers())
    state = {
        f"{'buffer' if name in buffers else 'weight'}/{name}": torch.empty_like(value)
        for name, value in model.state_dict().items()
    }
    state["state.exp_avg/blocks.1.0.weight"] = torch.empty(37, cases.WIDTH)
    dcp.load(state, storage_reader=Reader(path), no_dist=True)
    for key, value in state.items():
        role, _, name = key.partition("/")
        expected = states[f"{name}/exp_avg"].view(37, -1) if role == "state.exp_avg" else weights[name]
        assert torch.equal(value, expected), key


def test_dcp_is_told_of_damage(saved):
    path, _ = saved
    shard = path / "global_step2" / "rank-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"rank-00001.safetensors has"):
        Reader(path)


def test_dcps_own_safetensors_reader_reads_an_export(saved, capsys):
    path, wanted = saved
    assert main(["checkpoint", "export", str(path), str(path / "out")]) == 0
    state = {"embed.weight": torch.empty(24, 24), "norm.mean": torch.empty(24)}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(path / "out")), no_dist=True)
    assert torch.equal(state["embed.weight"], wanted[0]["weights"]["embed.weight"])
