"""Reading where other programs write too: regular files only, through no link, and no more than is expected. No torch.

A FIFO would hang, a device has no end, and a link leads elsewhere. So each file is looked at before it is opened,
opened without waiting, looked at again, and its size is known before a byte is read.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

__all__ = ["is_folder", "is_regular", "kind_of", "open_regular", "read_limited"]

_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def kind_of(mode: int) -> str | None:
    """What is there instead of a regular file, or ``None``."""
    return next((name for test, name in _KINDS if test(mode)), None)


def _mode(path: str | os.PathLike[str]) -> int:
    try:
        return os.lstat(path).st_mode
    except (OSError, ValueError):
        return 0


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` itself is a directory; a link to one is not."""
    return stat.S_ISDIR(_mode(path))


def is_regular(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` itself is a regular file; a link to one is not."""
    return stat.S_ISREG(_mode(path))


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read, unbuffered.

    Raises:
        OSError: if it cannot be opened, or is a link, a FIFO, a device or a directory; ``strerror`` says what.
    """
    _check(path, os.lstat(path).st_mode)  # some devices act when they are opened
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _check(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def _check(path: Path, mode: int) -> None:
    kind = kind_of(mode)
    if kind is not None:
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))


def read_limited(path: Path, limit: int) -> bytes:
    """All of a regular file of at most ``limit`` bytes.

    Raises:
        OSError: as :func:`open_regular`, and for a larger one, of which nothing is read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"it has {size} bytes, and no such file needs more than {limit}", str(path))
        parts, left = [], limit
        while left and (part := file.read(min(left, 1 << 20))):  # what lies in /proc has no size
            parts.append(part)
            left -= len(part)
        return b"".join(parts)
