"""A directory of checkpoints: which are there, which are intact, which is the newest, and who may write. Without torch.

    DIR/latest                            the tag of the newest checkpoint, as text
    DIR/<tag>/.shardline                  the mark: this folder was made by a save
    DIR/<tag>/manifest.json               what the checkpoint holds; with manifest.sha256, as ``sha256sum`` writes it
    DIR/<tag>/rank-00000.safetensors ...
    DIR/.shardline.lock                   held (lockf) by the job that writes here
    DIR/.shardline-tmp-<id>               a save in progress, or what is left of one that was killed
    DIR/.shardline-old-<id>-<tag>         what one of the same tag replaces; counts while DIR/<tag> is away
    DIR/.shardline-gone-<id>-<tag>        a checkpoint that is being deleted
    DIR/.shardline-latest-<id>            what ``latest`` becomes once the checkpoint ``id`` is in its place

A checkpoint directory gets its name by one rename when all of it is on disk, so one that is there is intact, unless
something damaged it afterwards: that its checksums tell.

Other programs may write here too. A folder is one of ours if it holds the mark or a manifest of the format, and then
only files of the names that a save writes are; what else lies in it stays under the folder's name. Links are followed
nowhere below DIR.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shardline.checkpoint.format.checksum import crc32
from shardline.checkpoint.format.files import is_folder, is_regular, kind_of, open_regular, read_limited
from shardline.checkpoint.format.lock import LOCK, Lock
from shardline.checkpoint.format.manifest import (
    FILE_NAME,
    LATEST,
    MANIFEST,
    MANIFEST_SUM,
    FileEntry,
    Manifest,
    check_tag,
    is_tag,
    read_manifest,
)
from shardline.errors import CheckpointError, shown, text_of
from shardline.names import listed

__all__ = ["Directory", "Found", "check_files", "dissolve", "has_mark", "set_mark", "sync"]

MARK = ".shardline"
TEMP, OLD, GONE, INTENT = (f"{MARK}-{kind}-" for kind in ("tmp", "old", "gone", "latest"))

_ID = re.compile(r"[0-9a-f]{32}")
_MARK_TEXT = "a checkpoint of Shardline: "


def check_files(path: Path, manifest: Manifest, numbers: Iterable[int]) -> list[str]:
    """What is wrong with the files ``numbers`` of a checkpoint: one clause each, naming the file. Reads them whole."""
    return _problems(path, manifest, numbers, _check_contents)


def check_sizes(path: Path, manifest: Manifest) -> list[str]:
    """The same for all files, without reading them."""
    return _problems(path, manifest, range(len(manifest.files)), lambda opened, entry, identity: None)


def _problems(
    path: Path, manifest: Manifest, numbers: Iterable[int], look: Callable[[BinaryIO, FileEntry, str], str | None]
) -> list[str]:
    problems = []
    for number in numbers:
        entry = manifest.files[number]
        file = path / entry.name
        try:
            with open_regular(file) as opened:
                size = os.fstat(opened.fileno()).st_size
                if size != entry.bytes:
                    problem: str | None = (
                        f"has {size} bytes, the manifest says {entry.bytes}: it is truncated, or from elsewhere"
                    )
                else:
                    problem = look(opened, entry, manifest.id)
        except FileNotFoundError:
            problem = "is missing"
        except OSError as error:
            problem = f"cannot be read: {error.strerror or error}"
        if problem:
            problems.append(f"{shown(file)} {problem}")
    return problems


def _check_contents(opened: BinaryIO, entry: FileEntry, identity: str) -> str | None:
    crc, chunk = 0, bytearray(1 << 20)
    while count := opened.readinto(chunk):  # type: ignore[attr-defined]
        crc = crc32(memoryview(chunk)[:count], crc)
    if crc == entry.crc32:
        return None
    opened.seek(0)
    head = opened.read(1 << 16)
    foreign = b'"id":"' in head and f'"id":"{identity}"'.encode() not in head
    return "is of another checkpoint" if foreign else "is damaged: its CRC-32 is not the one in the manifest"


# -- what is ours -----------------------------------------------------------------------------------------------------


def set_mark(folder: Path, identity: str) -> None:
    """Mark a new folder."""
    with (folder / MARK).open("x", encoding="utf-8") as file:
        file.write(f"{_MARK_TEXT}{identity}\n")


def has_mark(folder: Path, identity: str | None = None) -> bool:
    """Whether a save made ``folder``; with ``identity``, whether this one did."""
    try:
        text = read_limited(folder / MARK, 200).decode()
    except (OSError, ValueError):
        return False
    wanted = re.escape(identity) if identity is not None else _ID.pattern
    return re.fullmatch(f"{re.escape(_MARK_TEXT)}{wanted}\n", text) is not None


def _is_checkpoint(folder: Path) -> bool:
    """Whether a save made this folder, whatever became of it: by the mark, or by a manifest."""
    if not is_folder(folder):
        return False
    if has_mark(folder):
        return True
    try:
        read_manifest(folder)
    except CheckpointError:
        return False
    return True


def _is_empty(folder: Path) -> bool:
    """A folder that a killed process had just made, or almost removed; its name holds a random one of ours."""
    try:
        return is_folder(folder) and not any(folder.iterdir())
    except OSError:
        return False


def dissolve(folder: Path, home: Path | None = None, middle: Callable[[], None] = lambda: None) -> None:
    """Delete what a save wrote to ``folder``, and the folder; what else is in it moves to ``home``.

    The mark is deleted last, so that a later process can finish a deletion that was interrupted. ``middle`` is called
    after the first file.
    """
    entries = list(folder.iterdir())
    ours = [each for each in entries if _is_written(each.name) and is_regular(each)]
    if home is not None and len(ours) < len(entries):
        with contextlib.suppress(FileExistsError):
            home.mkdir()
        for each in set(entries) - set(ours) if is_folder(home) else ():
            if not os.path.lexists(home / each.name):
                os.rename(each, home / each.name)
    for number, each in enumerate(sorted(ours, key=lambda each: (each.name == MARK, each.name == MANIFEST))):
        each.unlink()
        if number == 0:
            middle()
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _is_written(name: str) -> bool:
    return name in (MARK, MANIFEST, MANIFEST_SUM) or FILE_NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class Found:
    """A checkpoint of a directory, as far as the manifest and the sizes of the files tell.

    Attributes:
        sequence: the number of the save: later ones have higher numbers, whatever their steps; -1 if not known.
        latest: whether a load without a tag may take it.
        problem: why it is not intact.
    """

    tag: str
    path: Path
    sequence: int
    latest: bool
    problem: str | None


class Directory:
    """A directory of checkpoints at ``path``, which need not exist."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def latest(self) -> str | None:
        """The tag that ``latest`` names.

        Raises:
            CheckpointError: if something else than a tag is there.
        """
        file = self.path / LATEST
        try:
            text = read_limited(file, 1000).decode().strip()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise CheckpointError(f"{shown(file)} cannot be read: {reason}.") from None
        if not is_tag(text):
            raise CheckpointError(f"{shown(file)} names {shown(repr(text), 100)}, which cannot be a checkpoint here.")
        return text

    def complaint(self) -> str | None:
        """Why ``latest`` cannot be followed, if so."""
        try:
            self.latest()
        except CheckpointError as error:
            return text_of(error).removesuffix(".")
        return None

    def locate(self, tag: str) -> Path | None:
        """Where the checkpoint ``tag`` lies: at its name, or set aside by a save that was killed in the middle.

        Raises:
            UsageError: if ``tag`` cannot be a checkpoint's name.
            CheckpointError: if a link is there.
        """
        path = self.path / check_tag(tag)
        if os.path.islink(path):
            raise CheckpointError(f"{shown(path)} is a symbolic link, which is not followed: name what it points to.")
        aside = [each for each, theirs in self._aside() if theirs == tag]
        if is_folder(path) and not (aside and not _is_checkpoint(path)):
            return path
        return aside[0] if aside else None

    def checkpoints(self) -> list[Found]:
        """All checkpoints, the newest first; those whose manifest cannot be read are last."""
        places = {tag: path for path, tag in self._aside()}
        for path in self._entries():
            if is_tag(path.name) and is_folder(path) and (has_mark(path) or is_regular(path / MANIFEST_SUM)):
                places[path.name] = path
        found = [_look(tag, path) for tag, path in places.items()]
        return sorted(found, key=lambda each: (-each.sequence, each.tag))

    def tags(self) -> list[str]:
        """All tags, the newest first; those whose manifest cannot be read are last."""
        return [each.tag for each in self.checkpoints()]

    def pending(self) -> str | None:
        """The tag of a checkpoint that is in its place although the job was killed before ``latest`` was written."""
        for intent, identity, _ in self._named(INTENT):
            tag = _intended(intent)
            with contextlib.suppress(CheckpointError):
                if tag and is_folder(self.path / tag) and read_manifest(self.path / tag).id == identity:
                    return tag
        return None

    def order(self) -> list[str]:
        """Tags in the order in which to try them: the one that was committed last, then the others by age.

        Those that were saved with ``save_latest=False`` are only found by their tag.
        """
        first = [self.pending()]
        with contextlib.suppress(CheckpointError):
            first.append(self.latest())
        wanted = [each.tag for each in self.checkpoints() if each.latest]  # or named as one that could not be taken
        return list(dict.fromkeys([*filter(None, first), *wanted]))

    def candidates(self, tag: str | None = None) -> Iterator[tuple[str, Path, str | None]]:
        """What ``tag`` names, else what a load without one may take, the newest first: a checkpoint that the path is
        itself, or those in it.

        Yields:
            Tag, path, and what is wrong at first sight.

        Raises:
            CheckpointError: if there is none.
            UsageError: if ``tag`` cannot be a checkpoint's name.
        """
        if tag is None and self.is_checkpoint():
            yield self.path.absolute().name, self.path, None
            return
        if tag is not None:
            path = self.locate(tag)
            if path is None:
                raise CheckpointError(
                    f"there is no checkpoint {tag!r} in {shown(self.path)}. There are: "
                    f"{', '.join(self.tags()) or 'none'}."
                )
            yield tag, path, None
            return
        found = {each.tag: each for each in self.checkpoints()}
        for each in self.order() or list(found):
            if each in found:
                yield each, found[each].path, found[each].problem
        if not found:
            raise CheckpointError(f"there is no checkpoint: {self.lack()}.")

    def choose(self, tag: str | None = None) -> tuple[str, Path, list[str]]:
        """The first of :meth:`candidates` with which nothing is wrong at first sight.

        Returns:
            Tag, path, and why later ones were passed over.

        Raises:
            CheckpointError: if there is none.
            UsageError: if ``tag`` cannot be a checkpoint's name.
        """
        problems: list[str] = []
        for each, path, problem in self.candidates(tag):
            if problem is None:
                return each, path, problems
            problems.append(problem)
        raise CheckpointError(f"no checkpoint in {shown(self.path)} is intact: {'; '.join(problems)}.")

    def is_checkpoint(self) -> bool:
        """Whether the path is a checkpoint itself, and no directory of them."""
        return is_regular(self.path / MANIFEST_SUM) or has_mark(self.path)

    def lack(self) -> str:
        """For a directory without a checkpoint: what is there instead."""
        path = self.path
        if not path.exists():
            return f"{shown(path.absolute())} does not exist"
        if not path.is_dir():
            return f"{shown(path.absolute())} is not a directory"
        if self.is_checkpoint():
            return (
                f"{shown(path.absolute())} is itself a checkpoint, not a directory of them: give the directory "
                f"{shown(path.absolute().parent)} and the tag {shown(repr(path.absolute().name))}"
            )
        names = [shown(each.name, 40) for each in self._entries() if each.name != LOCK]
        holds = f"it holds {listed(names, 5)}" if names else "it is empty"
        return f"{shown(path.absolute())} has no folder in it with a {MANIFEST} of Shardline's: {holds}"

    def _entries(self) -> list[Path]:
        try:
            return sorted(self.path.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _named(self, prefix: str) -> Iterator[tuple[Path, str, str]]:
        """Entries of the name ``<prefix><id>`` or ``<prefix><id>-<tag>``: path, id, tag (or "")."""
        for each in self._entries():
            if each.name.startswith(prefix):
                identity, dash, tag = each.name.removeprefix(prefix).partition("-")
                if _ID.fullmatch(identity) and (is_tag(tag) if prefix in (OLD, GONE) else not dash):
                    yield each, identity, tag

    def _aside(self) -> list[tuple[Path, str]]:
        return [(path, tag) for path, _, tag in self._named(OLD) if _is_checkpoint(path)]

    # -- for the one job that holds the lock ------------------------------------------------------------------------

    def check_free(self, tag: str, lock: Lock, *, latest: bool) -> None:
        """Say what a save to ``tag`` would take the place of.

        Raises:
            CheckpointError: if that is not Shardline's.
        """
        path = self.path / tag
        if os.path.lexists(path) and not _is_checkpoint(path):
            kind = kind_of(path.lstat().st_mode) or "a file"
            raise CheckpointError(
                f"{shown(path)} is {kind} that is not a checkpoint of Shardline, and it is not replaced. Save with "
                f"another tag or to another directory, or move it away"
            )
        if latest and not self._owns_latest(lock):
            raise CheckpointError(
                f"{shown(self.path / LATEST)} is not Shardline's, for it names no checkpoint of Shardline here, and it "
                f"is not replaced. Save to another directory, move it away, or save with save_latest=False"
            )

    def _owns_latest(self, lock: Lock) -> bool:
        """It names a checkpoint that is ours, or one that was deleted by hand since this directory's lock noted it."""
        if not os.path.lexists(self.path / LATEST):
            return True
        with contextlib.suppress(CheckpointError):
            tag = self.latest()
            if tag is not None:
                path = self.locate(tag)
                return _is_checkpoint(path) if path is not None else tag == lock.noted()
        return False

    def sweep(self) -> None:
        """Clear away what killed saves left, bringing back a checkpoint that was set aside and not replaced."""
        for aside, _, tag in self._named(OLD):
            target = self.path / tag
            if _is_empty(aside):
                aside.rmdir()
            elif not _is_checkpoint(aside):
                continue
            elif _is_checkpoint(target):
                dissolve(aside, target)
            elif not os.path.lexists(target):
                os.rename(aside, target)
        for doomed, _, tag in self._named(GONE):
            if _is_empty(doomed) or _is_checkpoint(doomed):
                dissolve(doomed, self.path / tag)
        pending = self.pending()
        for intent, _, _ in self._named(INTENT):
            named = _intended(intent)
            if named is not None and named == pending:
                os.replace(intent, self.path / LATEST)
            elif named is not None:
                intent.unlink()
        for temp, _, _ in self._named(TEMP):
            if _is_empty(temp) or has_mark(temp):
                dissolve(temp)

    def remove(self, tag: str) -> None:
        """Delete a checkpoint; no reader ever sees half of it. What a save did not write stays under its name.

        Raises:
            CheckpointError: if there is none.
        """
        path = self.locate(tag)
        if path is None or not _is_checkpoint(path):
            raise CheckpointError(f"there is no checkpoint {tag!r} in {shown(self.path)}.")
        doomed = self.path / f"{GONE}{secrets.token_hex(16)}-{tag}"
        os.rename(path, doomed)
        sync(self.path)
        dissolve(doomed, self.path / tag)

    def prune(self, keep: int) -> list[str]:
        """Delete all intact checkpoints but the ``keep`` newest; the one that ``latest`` names stays in any case.

        One that is not intact does not count, and stays: it may hold what can be put together again.
        """
        latest = None
        with contextlib.suppress(CheckpointError):
            latest = self.latest()
        intact = [each.tag for each in self.checkpoints() if each.problem is None]
        doomed = [tag for tag in intact[max(1, keep) :] if tag != latest]
        for tag in doomed:
            self.remove(tag)
        return doomed


def _look(tag: str, path: Path) -> Found:
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return Found(tag, path, -1, True, text_of(error).removesuffix("."))
    problems = check_sizes(path, manifest)
    return Found(tag, path, manifest.sequence, manifest.latest, "; ".join(problems) or None)


def _intended(intent: Path) -> str | None:
    """The tag that an intent names, "" where its writer was killed before it wrote, ``None`` for what is none."""
    try:
        text = read_limited(intent, 1000).decode()
    except (OSError, ValueError):
        return None
    tag = text.removesuffix("\n")
    return tag if not text or (text.endswith("\n") and is_tag(tag)) else None


def sync(path: Path) -> None:
    """Bring a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
