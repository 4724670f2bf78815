"""Files of other programs beside checkpoints: nothing changes them, nothing waits for them, nothing leads out."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shardline.checkpoint.format import directory as names
from shardline.checkpoint.format.directory import Directory
from shardline.checkpoint.format.lock import Lock
from shardline.errors import CheckpointError, ShardlineError
from tests.checkpoint import disk

ALONE = disk.Ring(0, [])
ID = "0123456789abcdef" * 2


def make(path, kind, outside):
    """Something that another program may have put at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "full folder":
        (path / "sub").mkdir(parents=True)
        (path / "sub" / "thesis.txt").write_text("three years of work")
        (path / "manifest.json").write_text("{}")
        (path / "rank-00000.safetensors").write_bytes(b"mine")
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.open(".", os.O_RDONLY)
        os.chdir(path.parent)  # its address has a short limit
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
        os.fchdir(here)
        os.close(here)
    elif kind == "link to a folder":
        path.symlink_to(outside / "folder")
    elif kind == "link to a file":
        path.symlink_to(outside / "file")
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling link":
        path.symlink_to(outside / "nothing")
    elif kind == "empty file":
        path.touch()
    else:
        path.write_text("three years of work")


KINDS = ("folder", "full folder", "FIFO", "socket", "link to a folder", "link to a file", "link to a device",
         "dangling link", "empty file", "file")  # fmt: skip
TAGS = ("src", "a", "b", "global_step1")
IDS = ("x", "cache", "notes-2020", ID, f"{ID}-a", f"{ID}-", f"{ID}-../a", f"{ID[:-1]}g-a")
NAMES = st.one_of(
    st.sampled_from([*TAGS, names.LOCK, ".lock", "latest", names.MARK, "manifest.json", "rank-00000.safetensors"]),
    st.builds(
        str.__add__,
        st.sampled_from([names.TEMP, names.OLD, names.GONE, names.INTENT, ".tmp-", ".old-", ".latest-"]),
        st.sampled_from(IDS),
    ),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=9),
)


def state(root):
    """Everything below ``root`` but what saves make: kind, owner, size, time, number, contents and target of each."""
    found = {}
    for folder, folders, files in os.walk(root):
        for each in [*folders, *files]:
            path = Path(folder, each)
            seen = path.lstat()
            what = os.readlink(path) if path.is_symlink() else path.read_bytes() if stat.S_ISREG(seen.st_mode) else ""
            when = seen.st_mtime_ns if not path.is_dir() or path.is_symlink() else 0  # of a folder: its entries
            found[str(path)] = (seen.st_mode, seen.st_ino, seen.st_nlink * (not path.is_dir()), when, what)
    return found


def is_left_of_a_save(name, kind):
    """An empty folder or file of this very name: a save that was killed made nothing else yet."""
    named = any(name == prefix + ID for prefix in (names.TEMP, names.INTENT)) or any(
        name == f"{prefix}{ID}-a" for prefix in (names.OLD, names.GONE)
    )
    return (named and kind in ("folder", "empty file")) or (name == names.LOCK and kind == "empty file")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(NAMES, st.sampled_from(KINDS)), max_size=8, unique_by=lambda entry: entry[0]))
@example([("src", "full folder"), (".tmp-cache", "full folder"), (".old-notes", "folder"), (".latest-news", "file")])
@example([("latest", "file"), (f"{names.OLD}{ID}-a", "full folder"), (f"{names.TEMP}{ID}", "full folder")])
@example([("latest", "FIFO"), ("a", "link to a folder"), (names.LOCK, "link to a file")])
@example([("a", "folder"), ("b", "socket"), ("latest", "folder"), (names.LOCK, "FIFO")])
def test_a_save_a_prune_and_a_look_change_nothing_of_others(tmp_path_factory, entries):
    root = tmp_path_factory.mktemp("root")
    outside, folder = root / "outside", root / "checkpoints"
    make(outside / "file", "file", outside)
    make(outside / "folder", "full folder", outside)
    folder.mkdir()
    for name, kind in entries:
        if name not in (".", "..") and not is_left_of_a_save(name, kind):
            make(folder / name, kind, outside)
    before = state(root)
    for tag in ("a", "b", "a", "src"):
        for latest in (True, False):
            try:
                disk.save(ALONE, folder, tag, 1, latest=latest, keep=1)
            except ShardlineError:
                continue
            directory = Directory(folder)
            assert directory.tags()[0] == tag
            directory.prune(1)
            if latest:
                assert disk.newest(folder) == (tag, 1)
    after = state(root)
    assert {path: after.get(path) for path in before} == before
    ours = {Path(path).relative_to(folder).parts[0] for path in after.keys() - before.keys()}
    assert ours <= {*TAGS, names.LOCK, "latest"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_checkpoint_is_not_replaced(tmp_path, kind):
    make(tmp_path / "run" / "src", kind, tmp_path)
    before = state(tmp_path)
    with pytest.raises(CheckpointError, match=r"run/src is .* that is not a checkpoint of Shardline.*another tag"):
        disk.save(ALONE, tmp_path / "run", "src", 1)
    after = state(tmp_path)
    assert {path: after.get(path) for path in before} == before
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith(".shardline-")]
    disk.save(ALONE, tmp_path / "run", "other", 2)


def test_a_latest_of_another_program_is_not_replaced(tmp_path):
    (tmp_path / "latest").write_text("my notes")
    with pytest.raises(CheckpointError, match=r"latest is not Shardline's.*save_latest=False"):
        disk.save(ALONE, tmp_path, "a", 1)
    disk.save(ALONE, tmp_path, "a", 1, latest=False)
    assert (tmp_path / "latest").read_text() == "my notes"
    (tmp_path / "latest").write_text("a\n")  # names a checkpoint here
    disk.save(ALONE, tmp_path, "b", 2)
    assert disk.newest(tmp_path) == ("b", 2)
    import shutil

    shutil.rmtree(tmp_path / "b")  # by hand; the file still names it
    disk.save(ALONE, tmp_path, "c", 3)
    assert disk.newest(tmp_path) == ("c", 3)


def test_files_that_others_put_into_a_checkpoint_stay_under_its_name(tmp_path):
    for step, tag in ((1, "a"), (2, "b"), (3, "b")):
        disk.save(ALONE, tmp_path, tag, step)
        (tmp_path / tag / f"notes{step}.txt").write_text("mine")
        (tmp_path / tag / "tokenizer").mkdir(exist_ok=True)
    assert sorted(os.listdir(tmp_path / "b")) == [
        ".shardline", "manifest.json", "manifest.sha256", "notes2.txt", "notes3.txt", "rank-00000.safetensors",
        "tokenizer",
    ]  # fmt: skip
    Directory(tmp_path).prune(1)
    assert sorted(os.listdir(tmp_path / "a")) == ["notes1.txt", "tokenizer"]
    assert Directory(tmp_path).tags() == ["b"]
    with pytest.raises(CheckpointError, match="a is a directory that is not a checkpoint"):
        disk.save(ALONE, tmp_path, "a", 4)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".shardline-")]


@pytest.mark.parametrize("kind", ["link to a file", "FIFO", "folder", "socket", "dangling link", "file"])
def test_a_lock_that_is_no_lock(tmp_path, kind):
    """It is opened through no link, and never truncated."""
    make(tmp_path / "run" / names.LOCK, kind, tmp_path)
    (tmp_path / "file").write_text("three years of work")
    before = state(tmp_path)
    with pytest.raises(CheckpointError, match=r"\.shardline\.lock (is|holds) .*Move it away"):
        Lock.of(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"\.shardline\.lock (is|holds)"):
        disk.save(ALONE, tmp_path / "run", "a", 1)
    assert state(tmp_path) == before


def test_only_whole_ones_count(tmp_path):
    """The newest lost its shard: it does not stand in for one that is intact."""
    for step in range(1, 5):
        disk.save(ALONE, tmp_path, f"s{step}", step)
    (tmp_path / "s4" / "rank-00000.safetensors").unlink()
    os.truncate(tmp_path / "s2" / "rank-00000.safetensors", 10)
    assert Directory(tmp_path).prune(1) == ["s1"]
    assert Directory(tmp_path).tags() == ["s4", "s3", "s2"]
    disk.save(ALONE, tmp_path, "s5", 5, keep=2)
    assert Directory(tmp_path).tags() == ["s5", "s4", "s3", "s2"]


def test_an_export_writes_through_no_link(tmp_path):
    """Its unfinished files have names of our own; the old ones were those of any program."""
    import torch

    from shardline.checkpoint.foreign.huggingface import TEMP, Exporter, Item

    (tmp_path / "file").write_text("three years of work")
    out = tmp_path / "out"
    make(out / ".tmp-model-00001", "file", tmp_path)
    make(out / f"{TEMP}model-00001", "link to a file", tmp_path)
    before = state(tmp_path)
    with pytest.raises(OSError, match="symbolic links"):
        Exporter(out, {"w": Item(torch.float32, (2,))}, {})
    assert state(tmp_path) == before
    (out / f"{TEMP}model-00001").unlink()
    exporter = Exporter(out, {"w": Item(torch.float32, (2,))}, {})
    exporter.add("w", torch.ones(2))
    assert len(exporter.finish()) == 2
    assert (out / ".tmp-model-00001").read_text() == (tmp_path / "file").read_text() == "three years of work"


def test_a_lock_that_was_refused_closes_its_file_once(tmp_path):
    """The number of the file belongs to another one soon."""
    (tmp_path / names.LOCK).write_text("three years of work")
    refused = Lock.__new__(Lock)
    with pytest.raises(CheckpointError, match="holds something else"):
        refused.__init__(tmp_path)
    reader, writer = os.pipe()  # one of them has its number now
    del refused
    os.write(writer, b"x")
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    os.close(writer)
