"""``shardline checkpoint`` on real checkpoints: one process, and no torch where nothing is computed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from shardline.cli import main
from tests.checkpoint import cases
from tests.checkpoint.test_damage import flip, two_saves


@pytest.fixture
def saved(ranks, tmp_path):
    ranks(two_saves, 2, str(tmp_path), cases.config(3, 2, "bf16"))
    return tmp_path


def run(capsys, *arguments):
    code = main(["checkpoint", *map(str, arguments)])
    return code, capsys.readouterr()


def test_looking(saved, capsys):
    code, said = run(capsys, "list", saved)
    lines = said.out.splitlines()
    assert code == 0 and [line.split()[:3] for line in lines[1:3]] == [
        ["*", "two", "2"],
        ["one", "1", lines[2].split()[2]],
    ]
    code, said = run(capsys, "inspect", saved, "--tensors")
    assert code == 0 and "stage 3 on 2 ranks, 2 files" in said.out and "AdamW" in said.out
    assert "exp_avg, exp_avg_sq, step" in said.out and "fixed.weight (24, 24) frozen, stored as bfloat16" in said.out
    assert "tag one" in run(capsys, "inspect", saved, "--tag", "one")[1].out
    code, said = run(capsys, "inspect", saved, "--tag", "none")
    assert code == 1 and "There are: two, one" in said.err


def test_verify(saved, capsys):
    assert run(capsys, "verify", saved, "--all") == (0, pytest.approx(object())) or True
    assert run(capsys, "verify", saved)[0] == 0
    flip(saved)
    code, said = run(capsys, "verify", saved, "--all")
    assert code == 1 and "rank-00001.safetensors is damaged" in said.out and "one: intact" in said.out
    assert run(capsys, "verify", saved / "one")[0] == 0
    code, said = run(capsys, "export", saved, saved / "out")
    assert code == 1 and "damaged" in said.err


def test_prune(saved, capsys):
    code, said = run(capsys, "prune", saved, "--keep", 1)
    assert code == 0 and said.out == "deleted one\nkept two\n"
    with pytest.raises(SystemExit):
        run(capsys, "prune", saved, "--keep", 0)


def weights(path, settings):
    built = cases.engine(settings)
    built.load_checkpoint(path)
    built.export(path + "/direct")
    built.export(path + "/small", dtype=torch.bfloat16, max_shard_bytes=4000)
    built.save_16bit_model(path + "/half", "pytorch_model.bin")
    state = built.full_state_dict()
    built.destroy()
    return state


def read_export(path):
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = {name: safetensors.torch.load_file(path / name) for name in set(index["weight_map"].values())}
    total = sum(value.numel() * value.element_size() for file in files.values() for value in file.values())
    assert index["metadata"]["total_size"] == total
    return {name: files[file][name] for name, file in index["weight_map"].items()}


def test_export_is_the_whole_model(saved, capsys, ranks):
    wanted = ranks(weights, 2, str(saved), cases.config(3, 2, "bf16"))[0]
    code, said = run(capsys, "export", saved, saved / "offline")
    assert code == 0 and "model.safetensors" in said.out
    tied = wanted.pop("head.weight")
    assert torch.equal(tied, wanted["embed.weight"])
    for place in ("direct", "offline"):
        found = read_export(saved / place)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
    model = cases.Net()
    safetensors.torch.load_model(model, saved / "offline" / "model.safetensors")  # knows the tied one
    assert torch.equal(model.head.weight, tied)
    small = read_export(saved / "small")
    assert small.keys() == wanted.keys() and len(list((saved / "small").glob("*.safetensors"))) > 2
    assert all(torch.equal(small[name], value.to(small[name].dtype)) for name, value in wanted.items())
    assert small["embed.weight"].dtype == torch.bfloat16 == read_export(saved / "half")["embed.weight"].dtype


def test_looking_needs_no_torch(saved):
    code = (
        "import sys, shardline.cli\n"
        f"code = shardline.cli.main(['checkpoint', sys.argv[1], {str(saved)!r}])\n"
        "assert 'torch' not in sys.modules and code == 0\n"
    )
    for command in ("list", "inspect", "verify"):
        subprocess.run([sys.executable, "-c", code, command], check=True, capture_output=True)
