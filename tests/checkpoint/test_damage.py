"""Damage is noticed and named; ``latest`` is only a hint; a load without a tag takes the newest intact checkpoint."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch

from shardline.errors import CheckpointError
from shardline.testing import RankFailed
from tests.checkpoint import cases


def two_saves(path, settings):
    built = cases.engine(settings)
    for steps, tag in ((1, "one"), (2, "two")):
        cases.train(built, steps)
        built.save_checkpoint(path, tag=tag)
    built.destroy()


def load(path, settings, tag=None):
    """What was loaded, what was said, and whether a failed load left the weights alone."""
    built = cases.engine(settings)
    said = []
    built.events.subscribe(lambda event: said.append(getattr(event, "message", "")))
    before = built.full_state_dict()
    error = None
    try:
        built.load_checkpoint(path, tag)
    except CheckpointError as caught:
        error = str(caught)
        assert all(torch.equal(value, before[name]) for name, value in built.full_state_dict().items())
    steps = built.global_steps
    built.destroy()
    return steps, error, [text for text in said if "later" in text]


SHARD = "two/rank-00001.safetensors"


def truncate(path):
    data = (path / SHARD).read_bytes()
    (path / SHARD).write_bytes(data[: len(data) // 2])


def flip(path):
    data = bytearray((path / SHARD).read_bytes())
    data[-100] ^= 1
    (path / SHARD).write_bytes(data)


def foreign(path):
    shutil.copy(path / "one/rank-00001.safetensors", path / SHARD)


def swapped(path):
    shutil.copy(path / "two/rank-00000.safetensors", path / SHARD)


def missing(path):
    (path / SHARD).unlink()


def manifest_gone(path):
    (path / "two/manifest.json").unlink()


def manifest_flipped(path):
    data = bytearray((path / "two/manifest.json").read_bytes())
    data[len(data) // 2] ^= 4
    (path / "two/manifest.json").write_bytes(data)


DAMAGE = {
    truncate: "rank-00001.safetensors has .* bytes, the manifest says .* truncated",
    flip: "rank-00001.safetensors is damaged: its CRC-32",
    foreign: "rank-00001.safetensors is of another checkpoint",
    swapped: "rank-00001.safetensors (is damaged|has)",
    missing: "rank-00001.safetensors is missing",
    manifest_gone: "two is not an intact checkpoint: its manifest cannot be read",
    manifest_flipped: "manifest.json is damaged: its SHA-256",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_named_and_the_one_before_is_taken(ranks, tmp_path, damage):
    import re

    settings = cases.config(2, 2)
    ranks(two_saves, 2, str(tmp_path), settings)
    damage(tmp_path)
    for steps, error, said in ranks(load, 2, str(tmp_path), settings):
        assert (steps, error) == (1, None)
        assert re.search(DAMAGE[damage], said[0]) and "one and not a later checkpoint" in said[0]
    for _, error, _ in ranks(load, 2, str(tmp_path), settings, "two"):
        assert re.search(f"two cannot be loaded: .*{DAMAGE[damage]}", error)


def test_nothing_whole_is_an_error_and_nothing_at_all_is_none(ranks, tmp_path):
    settings = cases.config(0, 1)
    assert ranks(load, 1, str(tmp_path / "new"), settings) == [(0, None, [])]
    ranks(two_saves, 1, str(tmp_path), settings)
    for tag in ("one", "two"):
        (tmp_path / tag / "rank-00000.safetensors").write_bytes(b"")
    (_, error, _) = ranks(load, 1, str(tmp_path), settings)[0]
    assert "is intact" in error and "one" in error and "two" in error
    (_, error, _) = ranks(load, 1, str(tmp_path), settings, "three")[0]
    assert "there is no" in error and "There are: two, one" in error


def test_a_newer_format_says_so(ranks, tmp_path):
    import hashlib

    settings = cases.config(0, 1)
    ranks(two_saves, 1, str(tmp_path), settings)
    file = tmp_path / "two" / "manifest.json"
    data = json.dumps(json.loads(file.read_text()) | {"version": 99}).encode()
    file.write_bytes(data)
    (tmp_path / "two" / "manifest.sha256").write_text(hashlib.sha256(data).hexdigest())
    (_, error, _) = ranks(load, 1, str(tmp_path), settings, "two")[0]
    assert "version 99" in error and "Use the version that wrote it" in error


# -- nothing is ever unpickled ----------------------------------------------------------------------------------------

FORBIDDEN = ("pickle.find_class", "exec", "compile", "marshal.loads")
_heard: list[str] = []
_listening = False


def _hear(event, args):
    if _listening and event in FORBIDDEN:
        _heard.append(f"{event} {str(args)[:100]}")


def save_and_load_listening(path, settings):
    global _listening
    sys.addaudithook(_hear)
    built = cases.engine(settings)
    cases.train(built, 2)
    built.save_checkpoint(path, client_state={"x": torch.ones(3), "y": (1, float("nan"))})  # imports happen here
    built.load_checkpoint(path)
    _heard.clear()
    _listening = True
    try:
        built.save_checkpoint(path, client_state={"x": torch.ones(3)})
        built.save_checkpoint(path, tag="b", async_save=True)
        built.load_checkpoint(path, "b")
        built.export(path + "/export")
    finally:
        _listening = False
    built.destroy()
    return list(_heard)


def test_nothing_is_unpickled_or_evaluated(ranks, tmp_path):
    assert ranks(save_and_load_listening, 2, str(tmp_path / "x"), cases.config(3, 2)) == [[], []]


def test_the_hook_hears(tmp_path):
    """The test above can fail."""
    import pickle

    global _listening
    sys.addaudithook(_hear)
    _listening = True
    try:
        pickle.loads(pickle.dumps(torch.nn.Linear))
    finally:
        _listening = False
    assert any(each.startswith("pickle.find_class") for each in _heard)


def test_a_value_that_cannot_be_saved_is_told_to_every_rank(ranks, tmp_path):
    with pytest.raises(RankFailed, match=r"on rank 0: client_state\['model'\] is a torch.nn.modules.linear.Linear"):
        ranks(save_bad, 2, str(tmp_path), cases.config(1, 2))


def save_bad(path, settings):
    built = cases.engine(settings)
    built.save_checkpoint(path, client_state={"model": torch.nn.Linear(1, 1)})
