"""A checkpoint is read from Python by name: no engine, no ranks, nothing that was not asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import shardline
from shardline.checkpoint.format.reader import CheckpointReader
from shardline.errors import CheckpointError
from tests.checkpoint.cases import WIDTH, Net
from tests.harness import Setup, peak_bytes, seeded, start


def saved(stage, path):
    """Two checkpoints, and what the engine says of the second: weights, and the optimizer's state in torch's form."""
    engine = start(Net, Setup(dtype="bf16").config(stage))
    for step in range(2):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.bfloat16)
        engine.backward(engine(x).float().square().mean())
        engine.step()
        engine.save_checkpoint(path, client_state={"epoch": step})
    result = engine.full_state_dict(), engine.full_optimizer_state_dict()
    engine.destroy()
    return result


@pytest.fixture(scope="module", params=[0, 3])
def checkpoint(request, ranks, tmp_path_factory):
    path = tmp_path_factory.mktemp(f"stage{request.param}")
    return path, *ranks(saved, 2, request.param, path)[0]


def test_it_is_the_state_dict_of_the_model(checkpoint):
    path, weights, _ = checkpoint
    with shardline.checkpoint.read(path) as found:
        assert set(found) == set(weights) and len(found) == len(weights)
        for name, value in weights.items():
            assert torch.equal(found[name], value) and found.shape(name) == value.shape
        assert (found.tag, found.global_steps, found.client_state) == ("global_step2", 2, {"epoch": 1})
        model = seeded(Net)
        model.load_state_dict(found.state_dict())
        assert torch.equal(model.blocks[0][0].weight, weights["blocks.0.0.weight"])
        half = found.state_dict(torch.bfloat16)
        assert half["head.weight"] is half["embed.weight"] and half["head.weight"].dtype is torch.bfloat16
        assert "scratch" not in found
        with pytest.raises(KeyError):
            found["no such weight"]
    with shardline.checkpoint.read(path, "global_step1") as earlier:
        assert earlier.global_steps == 1 and not torch.equal(earlier["head.weight"], weights["head.weight"])


def test_the_state_of_the_optimizer_by_name(checkpoint):
    path, _, full = checkpoint
    with shardline.checkpoint.read(path) as found:
        (group,) = found.param_groups
        assert group["lr"] == full["param_groups"][0]["lr"] and group["betas"] == full["param_groups"][0]["betas"]
        for number, name in enumerate(group["params"]):
            theirs = found.optimizer_state(name)
            assert theirs.keys() == full["state"][number].keys()
            assert all(torch.equal(theirs[key], value) for key, value in full["state"][number].items())
        assert found.optimizer_state("fixed.weight") == {}
        with pytest.raises(KeyError):
            found.optimizer_state("no such weight")


def test_only_what_is_asked_for_is_read(checkpoint, monkeypatch):
    path, weights, _ = checkpoint
    opened = []
    monkeypatch.setattr(CheckpointReader, "file", _noting(CheckpointReader.file, opened))
    with shardline.checkpoint.read(path) as found:
        list(found), len(found), found.param_groups, found.client_state
        assert opened == []
        size = weights["blocks.0.0.bias"].numel() * 4
        total = sum(value.numel() for value in weights.values()) * 4
        assert peak_bytes(lambda: found["blocks.0.0.bias"]) < 3 * size < total / 20
        assert opened


def _noting(call, calls):
    def noted(self, number):
        calls.append(number)
        return call(self, number)

    return noted


def test_a_damaged_file_is_noticed_when_it_is_needed(ranks, tmp_path):
    ranks(saved, 2, 3, tmp_path)
    file = tmp_path / "global_step2" / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with shardline.checkpoint.read(tmp_path) as found:
        assert found.global_steps == 2
        with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors is damaged"):
            found.state_dict()
    with shardline.checkpoint.read(tmp_path, verify=False) as found:
        assert set(found.state_dict()) >= {"head.weight"}
    file.write_bytes(data[:-1])  # its size tells without a look inside: the one before is taken
    assert shardline.checkpoint.read(tmp_path).global_steps == 1
    with pytest.raises(CheckpointError, match=r"there is no checkpoint 'other'.*global_step1"):
        shardline.checkpoint.read(tmp_path, "other")
    with pytest.raises(CheckpointError, match="does not exist"):
        shardline.checkpoint.read(tmp_path / "nowhere")
    assert shardline.checkpoint.read(tmp_path / "global_step1").tag == "global_step1"


def test_a_fresh_process_needs_neither_engine_nor_process_group(checkpoint):
    path, weights, _ = checkpoint
    program = (
        "import sys, shardline\n"
        f"found = shardline.checkpoint.read({str(path)!r})\n"
        "print(float(found['scale']))\n"
        "rooms = ('shardline.engine', 'shardline.comm', 'shardline.config')\n"
        "assert not [name for name in sys.modules if name.startswith(rooms)]\n"
        "import torch.distributed as dist\n"
        "assert not dist.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == float(weights["scale"])
