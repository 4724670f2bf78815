"""A directory of checkpoints: which are there, which are whole, which is the newest, and who may write. Without torch.

    DIR/latest                      the tag of the newest checkpoint, as text
    DIR/<tag>/manifest.json         what the checkpoint holds; with manifest.sha256, as ``sha256sum`` writes it
    DIR/<tag>/rank-00000.safetensors ...
    DIR/.lock                       held (lockf) by the job that writes here
    DIR/.tmp-*                      a save in progress, or what is left of one that was killed
    DIR/.old-<id>-<tag>             the checkpoint that one of the same tag is replacing; counts while DIR/<tag> is away
    DIR/.latest-<id>                what ``latest`` becomes once the checkpoint ``id`` is in its place

A checkpoint directory gets its name by one rename when all of it is on disk, so one that is there is whole, unless
something damaged it afterwards: that its checksums tell.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from shardline.checkpoint.checksum import crc32
from shardline.errors import CheckpointError, UsageError

__all__ = ["FORMAT", "LATEST", "MANIFEST", "VERSION", "Candidate", "Directory", "Lock", "check_files", "read_manifest"]

FORMAT, VERSION = "shardline", 1
MANIFEST, MANIFEST_SUM, LATEST = "manifest.json", "manifest.sha256", "latest"
TEMP, OLD, INTENT, LOCK = ".tmp-", ".old-", ".latest-", ".lock"

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to load: its tag, where it lies, and why none before it in the order could be taken."""

    tag: str
    path: Path


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at ``path``, checked against its own checksum.

    Raises:
        CheckpointError: if there is none, it is damaged, or its format is newer than this version reads.
    """
    file = path / MANIFEST
    try:
        data = file.read_bytes()
        expected = (path / MANIFEST_SUM).read_text().split()[:1]
    except (OSError, UnicodeDecodeError) as error:
        if any(path.glob("*mp_rank_*_model_states.pt")):
            raise CheckpointError(
                f"{path} is a checkpoint of DeepSpeed. Import it: shardline checkpoint import-deepspeed "
                f"{path.parent} OUT --tag {path.name}"
            ) from None
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"{path} is no whole checkpoint: its manifest cannot be read ({reason}).") from None
    if [hashlib.sha256(data).hexdigest()] != expected:
        raise CheckpointError(f"{file} is damaged: its SHA-256 is not the one in {MANIFEST_SUM}.")
    manifest: Manifest = json.loads(data)
    if manifest.get("format") != FORMAT or manifest.get("version", 0) > VERSION:
        raise CheckpointError(
            f"{file} has the format {manifest.get('format')!r} version {manifest.get('version')!r}; this version of "
            f"Shardline reads {FORMAT!r} up to version {VERSION}. Use the version that wrote it "
            f"({manifest.get('shardline')!r}) or a newer one."
        )
    return manifest


def check_files(path: Path, manifest: Manifest, numbers: Iterable[int]) -> list[str]:
    """What is wrong with the files ``numbers`` of a checkpoint: one clause each, naming the file. Reads them whole."""
    problems = []
    for number in numbers:
        row = manifest["files"][number]
        file = path / row["name"]
        try:
            with file.open("rb", buffering=0) as opened:
                problem = _check_file(opened, row, manifest["id"])
        except FileNotFoundError:
            problem = "is missing"
        except OSError as error:
            problem = f"cannot be read: {error.strerror or error}"
        if problem:
            problems.append(f"{file} {problem}")
    return problems


def _check_file(opened: IO[bytes], row: dict[str, Any], identity: str) -> str | None:
    size = os.fstat(opened.fileno()).st_size
    if size != row["bytes"]:
        return f"has {size} bytes, the manifest says {row['bytes']}: it is truncated, or from elsewhere"
    crc, chunk = 0, bytearray(1 << 20)
    while count := opened.readinto(chunk):  # type: ignore[attr-defined]
        crc = crc32(memoryview(chunk)[:count], crc)
    if crc == row["crc32"]:
        return None
    opened.seek(0)
    head = opened.read(1 << 16)
    foreign = b'"id":"' in head and f'"id":"{identity}"'.encode() not in head
    return "is of another checkpoint" if foreign else "is damaged: its CRC-32 is not the one in the manifest"


class Directory:
    """A directory of checkpoints at ``path``, which need not exist."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @staticmethod
    def check_tag(tag: str) -> str:
        """``tag`` if it can be a directory's name.

        Raises:
            UsageError: if not.
        """
        if not tag or tag.startswith(".") or tag == LATEST or "/" in tag or "\0" in tag or len(tag.encode()) > 200:
            raise UsageError(
                f"the tag {tag!r} cannot be the name of a checkpoint. Use up to 200 characters without '/', not "
                f"beginning with '.', and not {LATEST!r}."
            )
        return tag

    def latest(self) -> str | None:
        """The tag that ``latest`` names."""
        try:
            return (self.path / LATEST).read_text(encoding="utf-8").strip() or None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.path / LATEST} cannot be read: {error}.") from None

    def locate(self, tag: str) -> Path | None:
        """Where the checkpoint ``tag`` lies: at its name, or set aside by a save that was killed in the middle."""
        path = self.path / tag
        if path.is_dir():
            return path
        aside = [each for each in self._named(OLD) if each.name.removeprefix(OLD).partition("-")[2] == tag]
        return aside[0] if aside else None

    def tags(self) -> list[str]:
        """All tags, the newest first; those whose manifest cannot be read are last."""
        if not self.path.is_dir():
            return []
        found = {each.name for each in self.path.iterdir() if not each.name.startswith(".") and each.is_dir()}
        found |= {each.name.removeprefix(OLD).partition("-")[2] for each in self._named(OLD)}
        whole = {tag for tag in found if self._is_ours(tag)}
        return sorted(whole, key=self.sequence, reverse=True)

    def _is_ours(self, tag: str) -> bool:
        path = self.locate(tag)
        return path is not None and ((path / MANIFEST).exists() or any(path.glob("rank-*.safetensors")))

    def sequence(self, tag: str) -> int:
        """The number of the save: later ones have higher numbers, whatever their steps."""
        path = self.locate(tag)
        try:
            return int(read_manifest(path)["sequence"]) if path else -1
        except CheckpointError:
            return -1

    def pending(self) -> str | None:
        """The tag of a checkpoint that is in its place, while the job was killed before ``latest`` could say so."""
        for intent in self._named(INTENT):
            identity = intent.name.removeprefix(INTENT)
            with contextlib.suppress(OSError, UnicodeDecodeError, CheckpointError):
                tag = intent.read_text(encoding="utf-8").strip()
                path = self.path / tag
                if path.is_dir() and read_manifest(path)["id"] == identity:
                    return tag
        return None

    def order(self) -> list[str]:
        """Tags in the order in which to try them: the one that was committed last, then the others by age.

        Those that were saved with ``save_latest=False`` are only found by their tag.
        """
        first = [tag for tag in (self.pending(), self.latest()) if tag is not None]
        listed = []
        for tag in self.tags():
            path = self.locate(tag)
            try:
                wanted = bool(read_manifest(path)["latest"]) if path else False
            except CheckpointError:
                wanted = True  # it is named as one that could not be taken
            if wanted:
                listed.append(tag)
        return list(dict.fromkeys([*first, *listed]))

    def _named(self, prefix: str) -> list[Path]:
        if not self.path.is_dir():
            return []
        return sorted(each for each in self.path.iterdir() if each.name.startswith(prefix))

    # -- for the one job that holds the lock ------------------------------------------------------------------------

    def sweep(self) -> None:
        """Clear away what killed saves left, bringing back a checkpoint that was set aside and not replaced."""
        for aside in self._named(OLD):
            target = self.path / aside.name.removeprefix(OLD).partition("-")[2]
            if target.exists():
                shutil.rmtree(aside)
            else:
                os.rename(aside, target)
        pending = self.pending()
        for intent in self._named(INTENT):
            if pending is not None and intent.read_text(encoding="utf-8").strip() == pending:
                os.replace(intent, self.path / LATEST)
            else:
                intent.unlink()
        for temp in self._named(TEMP):
            shutil.rmtree(temp)

    def remove(self, tag: str) -> None:
        """Delete a checkpoint; nobody ever sees half of it."""
        path = self.locate(tag)
        if path is None:
            raise CheckpointError(f"there is no checkpoint {tag!r} in {self.path}.")
        doomed = self.path / f"{TEMP}remove-{tag}"
        os.rename(path, doomed)
        sync(self.path)
        shutil.rmtree(doomed)

    def prune(self, keep: int) -> list[str]:
        """Delete all but the ``keep`` newest checkpoints; the one that ``latest`` names stays in any case."""
        latest = self.latest()
        doomed = [tag for tag in self.tags() if self.sequence(tag) >= 0][max(1, keep) :]
        doomed = [tag for tag in doomed if tag != latest]
        for tag in doomed:
            self.remove(tag)
        return doomed


def sync(path: Path) -> None:
    """Bring a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Lock:
    """The right to write to a directory. The system takes it back when the process ends, however it ends."""

    _held: weakref.WeakValueDictionary[str, Lock] = weakref.WeakValueDictionary()

    def __init__(self, path: Path) -> None:
        self.busy = threading.Lock()  # one save at a time, also of several engines in one process
        self._file = (path / LOCK).open("a+", encoding="utf-8")
        try:
            # Not flock: that one lives on in forked loader workers when their parent was killed.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise CheckpointError(
                f"another job writes checkpoints to {path} ({owner}). Two jobs would overwrite each other's: end the "
                f"other one, or save to a directory of this job's own."
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    @classmethod
    def of(cls, path: Path) -> Lock:
        """The lock of ``path``, shared by everything in this process that keeps a reference to it."""
        name = os.path.realpath(path)
        lock = cls._held.get(name)
        if lock is None:
            lock = cls._held[name] = cls(path)
        return lock

    def __del__(self) -> None:
        file = getattr(self, "_file", None)
        if file is not None:
            file.close()
