"""Checkpoints of DeepSpeed itself are imported; a pickle that names anything else than tensors is refused.

The first needs DeepSpeed 0.19: name a Python that has it in DEEPSPEED_PYTHON, or install it beside Shardline.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from shardline.checkpoint.foreign.deepspeed import import_deepspeed
from shardline.checkpoint.foreign.pickled import Opaque, load
from shardline.checkpoint.format.reader import CheckpointReader
from shardline.cli import main
from shardline.errors import CheckpointError
from tests.harness import full

PYTHON = os.environ.get("DEEPSPEED_PYTHON") or (sys.executable if importlib.util.find_spec("deepspeed") else None)
needs_deepspeed = pytest.mark.skipif(PYTHON is None, reason="needs DeepSpeed: set DEEPSPEED_PYTHON")


def save_by_deepspeed(out, stage, dtype, *options):
    launch = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = [Path(__file__).with_name("deepspeed_job.py"), str(stage), dtype, str(out), *options]
    done = subprocess.run(
        [*launch, *job], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=380, check=False
    )
    assert done.returncode == 0, done.stdout


@full
@needs_deepspeed
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("stage", "dtype", "options"),
    [
        (0, "fp32", ["all"]),
        (0, "bf16", []),
        (1, "bf16", []),
        (2, "fp32", []),
        (2, "bf16", []),
        (3, "fp32", []),
        (3, "bf16", []),
    ],
)
def test_real_checkpoints(tmp_path, stage, dtype, options):
    save_by_deepspeed(tmp_path / "theirs", stage, dtype, *options)
    saved = torch.load(tmp_path / "theirs" / "expected.pt", weights_only=True)
    reader = CheckpointReader(import_deepspeed(tmp_path / "theirs", tmp_path / "ours"))
    assert len(saved["expected"]) >= 8
    for key, value in saved["expected"].items():
        name, _, what = key.partition("/")
        if what == "rounded":
            found = reader.buffer(name, 0) if name == "count" else reader.full(reader.aliases[name])
        else:
            found = reader.full(name, what if what == "weight" else f"state.{what}")
        assert torch.equal(found.to(value.dtype), value), key
    for name, value in saved["fixed"].items():
        found = reader.full(name)
        assert torch.equal(found, value.to(found.dtype)), name
    assert reader.aliases["head.weight"] == "embed.weight" and reader.buffer("count", 0).tolist() == [0, 1, 2]
    assert reader.manifest.counters.global_steps == 3 and reader.manifest.scheduler == {"last_epoch": 3}
    assert reader.value(reader.manifest.client_state) == {"note": "hello", "best": 0.5}
    assert reader.manifest.optimizer.kind == "AdamW"
    for name, row in reader.parameters.items():  # fp32 at stage 0: the moments have no other witness here
        for key in row["state"]:
            assert reader.full(name, f"state.{key}").shape == tuple(row["shape"])
            assert row["trainable"] and reader.full(name, f"state.{key}").abs().sum() > 0
    reader.close()


@full
@needs_deepspeed
@pytest.mark.timeout(400)
def test_whose_states_they_are_is_not_guessed(tmp_path):
    """fp32, stage 0, and frozen parameters of the shapes of trained ones: nothing in the file tells them apart."""
    save_by_deepspeed(tmp_path / "theirs", 0, "fp32")
    with pytest.raises(CheckpointError, match=r"8 optimizer states for 10 parameters .* with DeepSpeed at stage 1"):
        import_deepspeed(tmp_path / "theirs", tmp_path / "ours")


def test_files_of_torch_are_read_as_torch_reads_them(tmp_path):
    shared = torch.arange(12.0)
    value = OrderedDict(
        a=shared[2:8].view(2, 3).t(), b=shared, c=torch.ones(2, 2, dtype=torch.bfloat16), d=(1, 2.5, None, "x", [True]),
        e=torch.nn.Parameter(torch.rand(3)), f=torch.Size([2, 3]), g=torch.tensor(7), h=torch.empty(0),
    )  # fmt: skip
    torch.save(value, tmp_path / "x.pt")
    found, wanted = load(tmp_path / "x.pt"), torch.load(tmp_path / "x.pt", weights_only=True)
    assert list(found) == list(wanted) and found["d"] == wanted["d"] and tuple(wanted["f"]) == found["f"]
    for key in "abcegh":
        assert torch.equal(found[key], wanted[key]) and found[key].dtype == wanted[key].dtype
    assert found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr()


class Evil:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Evil(os.system, "touch pwned"), "posix.system"),
        (Evil(eval, "1+1"), "__builtin__.eval"),
        (Evil(getattr, "x", "upper"), "__builtin__.getattr"),
        (Evil(importlib.import_module, "os"), "importlib.import_module"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (Path("x"), "pathlib"),
    ],
)
def test_anything_else_is_refused_before_it_runs(tmp_path, monkeypatch, value, name):
    monkeypatch.chdir(tmp_path)
    torch.save({"optimizer_state_dict": value}, "x.pt")
    with pytest.raises(CheckpointError, match=f"it names {name}.*refused"):
        load(Path("x.pt"))
    assert not Path("pwned").exists()


def test_known_classes_become_nothing(tmp_path):
    torch.save({"scaler": Evil(Path, "a"), "x": 1}, tmp_path / "x.pt")
    found = load(tmp_path / "x.pt", opaque=["pathlib.PosixPath", "pathlib.Path"])
    assert type(found["scaler"]) is Opaque and found["x"] == 1


def test_damaged_files(tmp_path):
    torch.save({"a": torch.ones(100)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"x.pt cannot be imported"):
        load(tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
        archive.writestr("y/data.pkl", pickle.dumps(3)[:-1])
    with pytest.raises(CheckpointError, match=r"y.pt cannot be imported"):
        load(tmp_path / "y.pt")


def test_files_that_would_hang_or_fill_memory(tmp_path):
    """A FIFO, a device behind a link, and zeros that take a thousandth of their size."""
    os.mkfifo(tmp_path / "fifo.pt")
    (tmp_path / "link.pt").symlink_to("/dev/zero")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", pickle.dumps(1))
        archive.writestr("bomb/data/0", bytes(1 << 20))
    for name, why in {"fifo": "a FIFO", "link": "a symbolic link", "bomb": "it is compressed"}.items():
        with pytest.raises(CheckpointError, match=f"{name}.pt cannot be imported.*{why}"):
            load(tmp_path / f"{name}.pt")


def test_directories_that_are_none(tmp_path, capsys):
    assert main(["checkpoint", "import-deepspeed", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "no file 'latest'" in capsys.readouterr().err
    (tmp_path / "latest").write_text("a")
    assert main(["checkpoint", "import-deepspeed", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "not a DeepSpeed checkpoint" in capsys.readouterr().err


def test_loading_one_directly_says_what_to_do(tmp_path):
    from shardline.checkpoint.format.manifest import read_manifest

    (tmp_path / "tag").mkdir()
    (tmp_path / "tag" / "mp_rank_00_model_states.pt").touch()
    with pytest.raises(
        CheckpointError, match=r"of DeepSpeed. Import it: shardline checkpoint import-deepspeed .* --tag tag"
    ):
        read_manifest(tmp_path / "tag")
