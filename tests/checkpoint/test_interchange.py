"""torch.distributed.checkpoint reads and writes checkpoints, and reads an export by its own safetensors reader."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import shardline
from shardline.checkpoint.format.directory import Directory
from shardline.checkpoint.interchange import Reader, Writer, state_of
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


# -- from and to a job of FSDP2 ---------------------------------------------------------------------------------------

ADAMW = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


class Small(nn.Module):
    """Two layers whose rows do not divide by two, batch statistics of its own, and a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(10, 7), nn.Linear(7, 5)
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        with torch.no_grad():
            self.seen += 1
        return self.second(torch.tanh(self.first(x)))


def batch(step):
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(step))  # the same on all ranks


def step_of(model, optimizer, step):
    loss = model(batch(step)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def fsdp():
    model = Small()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in (model.first, model.second):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), **ADAMW)


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train_and_write(path):
    """Two steps by FSDP2, a checkpoint, a third step: its loss and the weights and moments then."""
    model, optimizer = fsdp()
    for step in range(2):
        step_of(model, optimizer, step)
    dcp.save(state_of(model, optimizer), storage_writer=Writer(path, step=2, optimizer="AdamW"))
    loss = step_of(model, optimizer, 2)
    return loss, {key: full(tensor.detach()).clone() for key, tensor in state_of(model, optimizer).items()}


def go_on(path, stage, save=None):
    """Load it, do the third step."""
    config = {
        "train_micro_batch_size_per_gpu": 6,
        "optimizer": {"type": "AdamW", "params": ADAMW},
        "zero_optimization": {"stage": stage, "unit_min_numel": 1, "unit_max_numel": 50},
    }
    engine = shardline.initialize(model=Small(), config=config)[0]
    loaded, _ = engine.load_checkpoint(path)
    assert loaded is not None and engine.global_steps == 2
    if save is not None:
        engine.save_checkpoint(save)
    loss = engine(batch(2)).square().mean()
    engine.backward(loss)
    engine.step()
    result = (loss.item(), engine.full_state_dict())
    engine.destroy()
    return result


def read_and_go_on(path):
    """Load it with FSDP2 into a model and an optimizer that know other values, do the third step."""
    model, optimizer = fsdp()
    step_of(model, optimizer, 77)
    state = state_of(model, optimizer)
    dcp.load(state, storage_reader=Reader(path))
    return step_of(model, optimizer, 2), {key: full(tensor.detach()) for key, tensor in state.items()}


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_what_fsdp_writes_shardline_takes_up_at_any_layout_and_fsdp_takes_back(ranks, tmp_path):
    theirs, ours = str(tmp_path / "theirs"), str(tmp_path / "ours")
    loss, state = ranks(train_and_write, 2, theirs)[0]
    assert {"weight/first.weight", "state.exp_avg_sq/second.bias", "state.step/first.bias", "buffer/seen"} < set(state)
    for world, stage in ((1, 0), (2, 3), (3, 2)):
        for ours_loss, weights in ranks(go_on, world, theirs, stage, ours if world == 3 else None):
            close(ours_loss, loss)
            for name, value in weights.items():
                close(value, state[f"{'buffer' if name == 'seen' else 'weight'}/{name}"])
    for path in (theirs, ours):
        for again_loss, again in ranks(read_and_go_on, 2, path):
            close(again_loss, loss)
            for key, value in state.items():
                close(again[key], value)
    assert main(["checkpoint", "verify", theirs]) == 0


def write_by_columns(path):
    mesh = init_device_mesh("cpu", (2,))
    state = {"weight/a": distribute_tensor(torch.arange(12.0).view(3, 4), mesh, [Shard(1)])}
    try:
        dcp.save(state, storage_writer=Writer(path))
    except dcp.api.CheckpointException as error:
        return str(error)
    return "written"


def test_columns_are_refused_by_every_rank(ranks, tmp_path):
    for said in ranks(write_by_columns, 2, str(tmp_path / "a")):
        assert "'weight/a' is sharded in another dimension than its first" in said
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"weight/a": torch.ones(2), "epoch": 3}, "'epoch' is not a tensor, and torch would pickle it"),
        ({"model.a": torch.ones(2)}, "'model.a' is not a key of a checkpoint"),
        ({"state.exp_avg/a": torch.ones(2)}, "no 'weight/a' that it belongs to"),
    ],
)
def test_what_has_no_place_is_refused_before_anything_is_written(tmp_path, state, said):
    with pytest.raises(dcp.api.CheckpointException, match=said):
        dcp.save(state, storage_writer=Writer(tmp_path / "a"), no_dist=True)
    assert not (tmp_path / "a").exists()


def test_shapes_of_every_kind(tmp_path):
    """State that is not shaped as its weight, empty tensors, none of their dimensions, other dtypes."""
    state = {
        "weight/a": torch.randn(3, 4), "state.row/a": torch.randn(3, 1), "state.step/a": torch.tensor(7.0),
        "weight/none": torch.randn(0, 4), "weight/number": torch.tensor(2.5), "weight/turned": torch.randn(4, 3).t(),
        "buffer/seen": torch.arange(3), "weight/half": torch.randn(5).bfloat16(),
    }  # fmt: skip
    dcp.save(state, checkpoint_id=tmp_path, storage_writer=Writer(step=7), no_dist=True)
    assert Directory(tmp_path).order() == ["global_step7"]
    found = {key: torch.full_like(value, 9) for key, value in state.items()}
    dcp.load(found, storage_reader=Reader(tmp_path), no_dist=True)
    for key, value in state.items():
        assert torch.equal(found[key], value), key
