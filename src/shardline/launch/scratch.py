"""The scratch directory of a launcher, and those that killed launchers left."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["scratch_directory"]

_PREFIX = "shardline-run-"
_NEW_SECONDS = 10.0  # a launcher that has just made its directory may not have locked it yet


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A new directory that this user alone can read, locked while it is in use, and removed at the end.

    First removes the directories of launchers of this user that were killed: the system has released their locks.
    """
    _sweep(Path(tempfile.gettempdir()))
    scratch = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


def _sweep(folder: Path) -> None:
    for path in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                status = os.fstat(opened)
                if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != 0o700:
                    continue
                if time.time() - status.st_mtime < _NEW_SECONDS:
                    continue
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(opened)
