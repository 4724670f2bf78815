"""Wherever a process is killed, the next start finds the newest intact checkpoint; what fails, fails on every rank."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import threading

import pytest

from shardline.checkpoint.format import commit as commit_module
from shardline.checkpoint.format.directory import Directory
from shardline.checkpoint.format.faults import EVERY_RANK, OVERWRITE, POINTS, RANK_ZERO
from shardline.checkpoint.format.lock import Lock
from shardline.errors import CheckpointError, UsageError
from tests.checkpoint import disk

COMMITTED = RANK_ZERO[RANK_ZERO.index("rename:after") :]
"""Points of rank 0 from which on the new checkpoint is there."""
LATE = ("commit-barrier:before", "commit-barrier:after")


def kill(tmp_path, point, rank, mode, background):
    """Save step 1 (not in the first mode), die while saving step 2, and look."""
    tag = {"first": "b", "next": "b", "overwrite": "a"}[mode]
    if mode != "first":
        assert disk.spawn(2, lambda ring: disk.save(ring, tmp_path, "a", 1)) == [0, 0]
    save = disk.save_in_background if background else disk.save
    codes = disk.spawn(2, lambda ring: save(ring, tmp_path, tag, 2, f"{point}@{rank}"))
    if codes[rank] == 0:  # a point that this mode does not pass
        assert mode != "overwrite" and point in (*OVERWRITE, "remove-old:middle", "remove-old:after")
        return
    assert codes[rank] == -9
    found = disk.newest(tmp_path)
    old = None if mode == "first" else ("a", 1)
    new = (tag, 2)
    if rank == 0 and (point in COMMITTED or point in LATE):
        assert found == new
    elif rank == 1 and point in ("shard-barrier:after", *LATE):
        assert found in (old, new)  # all shards are there, and rank 0 goes on by itself
    else:
        assert found == old
    # ... and the next job saves as if nothing had been.
    assert disk.spawn(2, lambda ring: disk.save(ring, tmp_path, "c", 3)) == [0, 0]
    assert disk.newest(tmp_path) == ("c", 3)
    assert Directory(tmp_path).latest() == "c"
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".shardline-")]
    assert set(Directory(tmp_path).tags()) - {"b"} == {"c"} | ({"a"} if mode != "first" else set())


@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", [pytest.param("first", marks=pytest.mark.slow), "next", "overwrite"])
def test_killed_anywhere(tmp_path, mode, background):
    """Every point on every rank that passes it: 11 on both ranks, 23 on rank 0; also in a thread while others work."""
    for number, (point, rank) in enumerate(
        [(point, rank) for point in EVERY_RANK for rank in (0, 1)] + [(point, 0) for point in RANK_ZERO]
    ):
        place = tmp_path / str(number)
        place.mkdir()
        try:
            kill(place, point, rank, mode, background)
        except AssertionError as error:
            raise AssertionError(f"{mode} save, {point} on rank {rank}: {error}") from error
        shutil.rmtree(place)


def test_every_point_is_passed(tmp_path):
    """The list is complete: a save that overwrites calls each point, and no other."""
    seen = []
    ring = disk.Ring(0, [])
    for step in (1, 2):
        commit_module.commit(tmp_path, "a", disk.content(ring, step), ring, seen.append, keep=1)
    assert set(seen) == set(POINTS)


def fails_on_every_rank(path, before=lambda ring: None, said="", after=lambda ring: None):
    """A save that fails on some rank raises on all, leaves nothing behind, and the next one works."""

    def body(ring):
        before(ring)
        with pytest.raises(CheckpointError, match=said):
            disk.save(ring, path, "b", 2)
        after(ring)
        ring.exchange(None)
        disk.save(ring, path, "c", 3)

    assert disk.spawn(2, lambda ring: disk.save(ring, path, "a", 1)) == [0, 0]
    assert disk.spawn(2, body) == [0, 0]
    assert disk.newest(path) == ("c", 3) and set(Directory(path).tags()) == {"a", "c"}
    assert not [name for name in os.listdir(path) if name.startswith(".shardline-")]


def broken(rank, where, error):
    """Make ``commit.<where>`` raise on ``rank``; returns what undoes it."""
    original = getattr(commit_module, where)

    def raises(*args, **kwargs):
        raise error

    def before(ring):
        if ring.rank == rank:
            setattr(commit_module, where, raises)

    def after(ring):
        setattr(commit_module, where, original)

    return before, after


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_is_told_to_every_rank(tmp_path, rank):
    before, after = broken(rank, "write", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file"))
    fails_on_every_rank(tmp_path, before, rf"on rank {rank}: No space left on device: file. Make room", after)


CALLS = [
    ("mkdir", 0),
    ("open", 0),
    ("open", 1),
    ("fsync", 0),
    ("fsync", 1),
    ("rename", 0),
    ("replace", 0),
    ("posix_fallocate", 1),
]
"""Calls to the system that a save makes, and the rank for which they fail: root is refused nothing by permissions."""


@pytest.mark.parametrize(("call", "rank"), CALLS)
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_call_that_the_system_refuses(tmp_path, call, rank, number):
    """A disk that became read-only, full or broken, or a directory that is another user's, on one rank only."""
    originals = os.mkdir, os.posix_fallocate, os.fsync, os.rename, os.replace, io.open

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number), "file")

    def refuse_to_write(path, mode="r", *args, **kwargs):
        return refuse() if "x" in mode and "-tmp-" in str(path) else originals[-1](path, mode, *args, **kwargs)

    def before(ring):
        if ring.rank == rank:
            setattr(io if call == "open" else os, call, refuse_to_write if call == "open" else refuse)

    def after(ring):
        os.mkdir, os.posix_fallocate, os.fsync, os.rename, os.replace, io.open = originals

    advice = {errno.EROFS: "Save to a file system that can be written", errno.EACCES: "Give this user the right"}
    said = rf"failed on rank {rank}: {re.escape(os.strerror(number))}.*{advice.get(number, '')}"
    if call == "replace":  # the checkpoint is there already: what failed is to name it as the newest
        return after_the_commit(tmp_path, before, said, after)
    fails_on_every_rank(tmp_path, before, said, after)


def after_the_commit(path, before, said, after):
    def body(ring):
        before(ring)
        with pytest.raises(CheckpointError, match=said):
            disk.save(ring, path, "b", 2)
        after(ring)
        ring.exchange(None)
        if ring.rank == 0:
            assert disk.newest(path) == ("b", 2)
        ring.exchange(None)
        disk.save(ring, path, "c", 3)

    assert disk.spawn(2, lambda ring: disk.save(ring, path, "a", 1)) == [0, 0]
    assert disk.spawn(2, body) == [0, 0]
    assert disk.newest(path) == ("c", 3) and set(Directory(path).tags()) == {"a", "b", "c"}


@pytest.mark.parametrize("where", ["_write_manifest", "_put_in_place"])
def test_a_failing_commit_is_told_to_every_rank(tmp_path, where):
    before, after = broken(0, where, OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "x"))
    fails_on_every_rank(tmp_path, before, "committing .* failed on rank 0: .*quota", after)


def test_a_real_limit_on_file_size(tmp_path):
    """The kernel's own refusal in the middle of a shard, on one rank."""
    import resource
    import signal

    def before(ring):
        if ring.rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))

    def after(ring):
        if ring.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    fails_on_every_rank(tmp_path, before, "failed on rank 1: File too large", after)


@pytest.mark.parametrize("what", ["a file", "/proc"])
def test_a_directory_that_cannot_be_written(tmp_path, what):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "below" if what == "a file" else "/proc/shardline"
    with pytest.raises(CheckpointError, match="preparing the checkpoint"):
        disk.save(disk.Ring(0, []), path, "a", 1)


def test_ranks_that_see_different_directories(tmp_path, monkeypatch):
    monkeypatch.setattr(commit_module, "_MARK_SECONDS", 0.0)

    def body(ring):
        own = tmp_path / f"disk{ring.rank}"
        own.mkdir()
        with pytest.raises(CheckpointError, match=r"on rank 1: this rank does not see the directory .*disk0"):
            disk.save(ring, own, "a", 1)
        assert not [name for name in os.listdir(own) if name.startswith(".shardline-")]

    assert disk.spawn(2, body) == [0, 0]


def test_two_jobs_on_one_directory(tmp_path):
    tmp_path.joinpath("x").mkdir()
    lock = Lock.of(tmp_path)
    assert Lock.of(tmp_path / "x" / "..") is lock  # two engines of one job share it

    def body(ring):
        Lock._held.clear()  # another process has no memory of ours
        with pytest.raises(CheckpointError, match=rf"another job writes .*process {os.getppid()} on"):
            disk.save(ring, tmp_path, "a", 1)

    assert disk.spawn(1, body) == [0]
    del lock
    disk.save(disk.Ring(0, []), tmp_path, "a", 1)


@pytest.mark.parametrize("tag", ["", "../x", "a/b", ".hidden", "latest", "x" * 300])
def test_tags_that_are_no_names(tmp_path, tag):
    with pytest.raises(UsageError, match="cannot be the name"):
        disk.save(disk.Ring(0, []), tmp_path, tag, 1)


def test_keep_deletes_the_oldest(tmp_path):
    ring = disk.Ring(0, [])
    for step in range(1, 6):
        disk.save(ring, tmp_path, f"s{step}", step, keep=2)
    assert Directory(tmp_path).tags() == ["s5", "s4"]
    (tmp_path / "latest").write_text("s4")  # the user goes back
    disk.save(ring, tmp_path, "s9", 9, keep=1, latest=False)
    assert set(Directory(tmp_path).tags()) == {"s9", "s4"}


def test_latest_can_be_set_back_by_hand(tmp_path):
    ring = disk.Ring(0, [])
    for step in (1, 2):
        disk.save(ring, tmp_path, f"s{step}", step)
    disk.save(ring, tmp_path, "aside", 7, latest=False)
    assert disk.newest(tmp_path) == ("s2", 2)
    (tmp_path / "latest").write_text("s1\n")
    assert disk.newest(tmp_path) == ("s1", 1)
    (tmp_path / "latest").write_text("gone")
    assert Directory(tmp_path).order() == ["gone", "s2", "s1"]


def test_two_engines_of_one_job_take_turns(tmp_path):
    """The one does not take the other's temporary directory, which a thread may be writing, for a dead one."""
    inside, go_on = threading.Event(), threading.Event()

    def reach(point):
        if point == "shard-write:middle":
            inside.set()
            assert go_on.wait(30)

    ring = disk.Ring(0, [])
    first = threading.Thread(
        target=lambda: commit_module.commit(tmp_path, "a", disk.content(ring, 1), ring, reach), name="first"
    )
    first.start()
    assert inside.wait(30)
    second = threading.Thread(target=lambda: disk.save(ring, tmp_path, "b", 2), name="second")
    second.start()
    second.join(0.2)
    assert second.is_alive()
    go_on.set()
    first.join()
    second.join()
    assert set(Directory(tmp_path).tags()) == {"a", "b"} and disk.newest(tmp_path) == ("b", 2)


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    """A job was killed, and a loader worker of it is still there."""
    ready, release = os.pipe(), os.pipe()

    def body(ring):
        disk.save(ring, tmp_path, "a", 1, hold=kept.append)
        if os.fork() == 0:
            os.write(ready[1], b"x")
            os.read(release[0], 1)
            os._exit(0)
        os.kill(os.getpid(), 9)

    kept = []
    assert disk.spawn(1, body) == [-9]
    os.read(ready[0], 1)
    try:
        disk.save(disk.Ring(0, []), tmp_path, "b", 2)
    finally:
        os.write(release[1], b"x")
    for end in (*ready, *release):
        os.close(end)
