"""The last step that was given to a tracker, in a file that outlives a kill."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

__all__ = ["Mark"]

_NUMBER = struct.Struct("<q")


class Mark:
    """A number in a file: to write it is to write to memory, which the system keeps when the process is killed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.stat().st_size != _NUMBER.size:
            path.write_bytes(_NUMBER.pack(0))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _NUMBER.size)

    @property
    def step(self) -> int:
        return int(_NUMBER.unpack_from(self._memory)[0])

    @step.setter
    def step(self, step: int) -> None:
        _NUMBER.pack_into(self._memory, 0, step)

    def close(self) -> None:
        self._memory.close()
