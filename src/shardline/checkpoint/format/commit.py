"""The commit: all ranks write into one temporary directory, and one rename makes it a checkpoint.

    all           finish the copies that a save in the background writes
    rank 0        lock, clear away the remains of killed saves, make the temporary directory with its mark
    all           exchange: the name of the directory
    each          see the mark; write its shard, flush, fsync
    all           exchange: size and checksum of the shard, or the error: then every rank raises it
    rank 0        write the manifest, fsync it and the directory; rename; fsync; replace ``latest``; fsync; prune
    all           exchange: done, or the error

Whatever fails, the temporary directory is removed, the checkpoints that were there are untouched, and the job can go
on. Whenever a process dies, a reader finds the old checkpoints and perhaps the new one, each intact.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from shardline.checkpoint.format import directory as layout
from shardline.checkpoint.format.content import Content
from shardline.checkpoint.format.directory import Directory, dissolve, has_mark, set_mark, sync
from shardline.checkpoint.format.faults import Reach
from shardline.checkpoint.format.lock import Lock
from shardline.checkpoint.format.manifest import (
    FORMAT,
    LAST_SEQUENCE,
    LATEST,
    MANIFEST,
    MANIFEST_SUM,
    VERSION,
    Manifest,
    check_tag,
    file_name,
    largest_manifest,
)
from shardline.checkpoint.format.tensorfile import write
from shardline.errors import CheckpointError, shown, text_of

__all__ = ["Channel", "SingleProcess", "commit", "together"]

T = TypeVar("T")
_MARK_SECONDS = 2.0  # a network file system may show a new directory a moment late


class Channel(Protocol):
    """Messages between ranks: JSON values."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def exchange(self, value: Any) -> list[Any]: ...


class SingleProcess:
    """The channel of one process."""

    rank, world_size = 0, 1

    def exchange(self, value: Any) -> list[Any]:
        return [value]

    def close(self) -> None:
        pass


def together(channel: Channel, what: str, action: Callable[[], T]) -> list[Any]:
    """Do something that may fail on some ranks only; its results (JSON values) by rank.

    Raises:
        CheckpointError: on every rank alike, if it failed on any; names the ranks and what each said.
    """
    value: T | None = None
    cause: Exception | None = None
    try:
        value = action()
    except Exception as error:
        cause = error
    everyone = channel.exchange([value, None if cause is None else _say(cause)])
    failed = {rank: error for rank, (_, error) in enumerate(everyone) if error is not None}
    if not failed:
        return [value for value, _ in everyone]
    alike = len(set(failed.values())) == 1
    said = next(iter(failed.values())) if alike else "; ".join(f"rank {rank}: {text}" for rank, text in failed.items())
    whom = "" if channel.world_size == 1 else f" on rank {', '.join(map(str, failed))}"
    raise CheckpointError(f"{what} failed{whom}: {said}") from cause


def _say(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        advice = {
            errno.ENOSPC: " Make room on the disk, keep fewer checkpoints, or save elsewhere.",
            errno.EDQUOT: " Make room in the quota, keep fewer checkpoints, or save elsewhere.",
            errno.EACCES: " Give this user the right to write there, or save elsewhere.",
            errno.EROFS: " Save to a file system that can be written.",
        }.get(error.errno or 0, "")
        return f"{error.strerror}: {error.filename or ''}.{advice}".replace(": .", ".")
    return text_of(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text_of(error)}"


def commit(
    path: str | os.PathLike[str],
    tag: str,
    content: Content,
    channel: Channel,
    reach: Reach,
    *,
    latest: bool = True,
    keep: int | None = None,
    hold: Callable[[Lock], None] = lambda lock: None,
) -> Path:
    """Write a checkpoint. Collective; returns its directory when it is committed, on every rank.

    Args:
        path: the directory of checkpoints, the same for all ranks.
        latest: whether ``latest`` names it afterwards.
        keep: delete all but so many of the newest afterwards.
        hold: gets the directory's lock on rank 0, to keep it for as long as the job writes here.

    Raises:
        CheckpointError: on every rank, if any failed.
    """
    return _Commit(Directory(path), check_tag(tag), content, channel, reach, latest, keep, hold).run()


class _Commit:
    """One commit. What a rank does between two exchanges is one method.

    Attributes:
        ours: what rank 0 made and must clear away if anything fails.
        lock: held by rank 0 until the commit is over.
    """

    def __init__(
        self,
        directory: Directory,
        tag: str,
        content: Content,
        channel: Channel,
        reach: Reach,
        latest: bool,
        keep: int | None,
        hold: Callable[[Lock], None],
    ) -> None:
        self.directory, self.tag, self.final = directory, tag, directory.path / tag
        self.content, self.channel, self.reach = content, channel, reach
        self.latest, self.keep, self.hold = latest, keep, hold
        self.lock: Lock | None = None
        self.ours: list[Path] = []

    def run(self) -> Path:
        """See :func:`commit`."""
        channel, reach = self.channel, self.reach
        reach("begin")
        try:
            plan = together(channel, f"preparing the checkpoint {self.final}", self._prepare)[0]
            reach("prepare-barrier:after")
            temp = self.directory.path / f"{layout.TEMP}{plan['id']}"
            reports = together(channel, f"writing the checkpoint {self.final}", lambda: self._write_shard(temp, plan))
            reach("shard-barrier:after")
            together(channel, f"committing the checkpoint {self.final}", lambda: self._finish(temp, plan, reports))
            reach("commit-barrier:after")
        except BaseException:
            self._clear_away()
            raise
        finally:
            if self.lock is not None:
                self.lock.busy.release()
        return self.final

    def _prepare(self) -> dict[str, Any] | None:
        """Make the temporary directory, on rank 0; returns what all ranks must know of it."""
        reach, directory = self.reach, self.directory
        self.content.ready()
        reach("prepare-barrier:before")
        if self.channel.rank != 0:
            return None
        directory.path.mkdir(parents=True, exist_ok=True)
        lock = Lock.of(directory.path)
        self.hold(lock)
        lock.busy.acquire()
        self.lock = lock
        reach("lock:after")
        directory.sweep()
        reach("sweep:after")
        directory.check_free(self.tag, lock, latest=self.latest)
        identity = secrets.token_hex(16)
        temp = directory.path / f"{layout.TEMP}{identity}"
        self.ours.append(temp)
        temp.mkdir()
        reach("mkdir:after")
        set_mark(temp, identity)
        reach("mark-write:after")
        newest = max(directory.checkpoints(), key=lambda each: each.sequence, default=None)
        if newest is not None and newest.sequence == LAST_SEQUENCE:
            raise CheckpointError(
                f"{shown(newest.path)} has the last number that a save can have. Remove it, or save elsewhere."
            )
        return {
            "id": identity,
            "sequence": 0 if newest is None else newest.sequence + 1,
            "path": str(directory.path.absolute()),
        }

    def _write_shard(self, temp: Path, plan: Mapping[str, Any]) -> list[Any]:
        """Write this rank's tensors; returns what the manifest says of their file."""
        reach, rank = self.reach, self.channel.rank
        _see_mark(temp, plan["id"], plan["path"])
        reach("shard-write:before")
        with _opened(temp / file_name(rank), buffering=0) as file:
            written = write(
                file,  # type: ignore[arg-type]
                self.content.tensors,
                {"format": "pt", "id": plan["id"], "rank": str(rank)},
                lambda: reach("shard-write:middle"),
            )
            reach("shard-write:after")
        reach("shard-fsync:after")
        reach("shard-barrier:before")
        return [written.bytes, written.crc32, self.content.report]

    def _finish(self, temp: Path, plan: Mapping[str, Any], reports: Sequence[Any]) -> None:
        """Write the manifest and rename the directory, on rank 0, which has the lock."""
        reach, lock = self.reach, self.lock
        if lock is not None:
            head = {
                "format": FORMAT,
                "version": VERSION,
                "id": plan["id"],
                "sequence": plan["sequence"],
                "tag": self.tag,
                "latest": self.latest,
                "files": [
                    {"name": file_name(rank), "bytes": size, "crc32": crc}
                    for rank, (size, crc, _) in enumerate(reports)
                ],
            }
            _write_manifest(temp, head | self.content.body([report for _, _, report in reports]).to_json(), reach)
            self.directory.check_free(self.tag, lock, latest=self.latest)  # it took a while to write
            _put_in_place(self.directory, temp, self.final, plan["id"], reach, self.ours, lock if self.latest else None)
            if self.keep is not None:
                self.directory.prune(self.keep)
            reach("prune:after")
        reach("commit-barrier:before")

    def _clear_away(self) -> None:
        for each in self.ours:
            with contextlib.suppress(OSError):
                if each.is_dir():
                    dissolve(each)
                else:
                    each.unlink()


def _see_mark(temp: Path, identity: str, theirs: str) -> None:
    give_up = time.monotonic() + _MARK_SECONDS
    while not has_mark(temp, identity):
        if time.monotonic() > give_up:
            raise CheckpointError(
                f"this rank does not see the directory that rank 0 made in {theirs}: here, {temp.parent.absolute()} "
                f"is another one. All ranks must save to one directory on a file system that they share, by a path "
                f"that means the same to all."
            )
        time.sleep(0.05)


@contextlib.contextmanager
def _opened(path: Path, buffering: int = -1) -> Iterator[IO[bytes]]:
    """A new file whose contents are on the disk afterwards."""
    with path.open("xb", buffering=buffering) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _write_manifest(temp: Path, manifest: Mapping[str, Any], reach: Reach) -> None:
    data = _checked(manifest)
    reach("manifest-write:before")
    with _opened(temp / MANIFEST) as file:
        file.write(data[: len(data) // 2])
        file.flush()
        reach("manifest-write:middle")
        file.write(data[len(data) // 2 :])
        reach("manifest-write:after")
    reach("manifest-fsync:after")
    with _opened(temp / MANIFEST_SUM) as file:
        file.write(f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n".encode())
    reach("checksum-write:after")
    sync(temp)
    reach("temp-fsync:after")


def _checked(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as text that a reader will take.

    Raises:
        CheckpointError: if values of the user's make it too large, or nest too deep.
    """
    try:
        data = json.dumps(manifest, separators=(",", ":"), allow_nan=False).encode()
    except RecursionError:
        raise CheckpointError("the values to save are nested too deep") from None
    limit = largest_manifest(len(manifest["files"]))
    if len(data) > limit:
        sizes = {key: len(json.dumps(value, separators=(",", ":"))) for key, value in manifest.items()}
        most = max(sizes, key=lambda key: sizes[key])
        raise CheckpointError(
            f"the manifest would have {len(data)} bytes, {sizes[most]} of them for {most!r}, and no more than {limit} "
            f"are read back. Save long lists of numbers as tensors."
        )
    try:
        Manifest.parse(data)
    except CheckpointError as error:
        raise CheckpointError(f"the manifest {text_of(error)}") from None
    return data


def _put_in_place(
    directory: Directory, temp: Path, final: Path, identity: str, reach: Reach, ours: list[Path], lock: Lock | None
) -> None:
    """The commit point is the rename in the middle. With ``lock``, ``latest`` names the checkpoint afterwards."""
    parent = directory.path
    intent = parent / f"{layout.INTENT}{identity}"
    if lock is not None:  # written before the rename: a full disk shows while nothing has changed yet
        reach("intent-write:before")
        ours.append(intent)
        with _opened(intent) as file:
            file.write(f"{final.name}\n".encode())
        reach("intent-write:after")
    aside = parent / f"{layout.OLD}{identity}-{final.name}"
    replaced = os.path.lexists(final)
    if replaced:
        os.rename(final, aside)
        reach("set-aside:after")
        sync(parent)
        reach("set-aside-fsync:after")
    reach("rename:before")
    try:
        os.rename(temp, final)
    except OSError:
        if replaced:
            os.rename(aside, final)
        raise
    ours.clear()
    reach("rename:after")
    sync(parent)
    reach("rename-fsync:after")
    if lock is not None:
        reach("latest:before")
        lock.note(final.name)
        os.replace(intent, parent / LATEST)
        reach("latest:after")
        sync(parent)
        reach("latest-fsync:after")
    if replaced:
        dissolve(aside, final, lambda: reach("remove-old:middle"))
        reach("remove-old:after")
