"""The moments of a save at which tests kill the process: each has a name, and one environment variable chooses one.

``SHARDLINE_FAULT="rename:before@0"`` makes rank 0 end itself with SIGKILL right before the rename. The promise that is
tested: wherever a process dies, the next start finds an intact checkpoint, the newest one that was committed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

__all__ = ["EVERY_RANK", "OVERWRITE", "POINTS", "RANK_ZERO", "Reach", "armed"]

EVERY_RANK = (
    "begin",
    "prepare-barrier:before",
    "prepare-barrier:after",
    "shard-write:before",
    "shard-write:middle",
    "shard-write:after",
    "shard-fsync:after",
    "shard-barrier:before",
    "shard-barrier:after",
    "commit-barrier:before",
    "commit-barrier:after",
)
OVERWRITE = ("set-aside:after", "set-aside-fsync:after")
RANK_ZERO = (
    "lock:after",
    "sweep:after",
    "mkdir:after",
    "mark-write:after",
    "manifest-write:before",
    "manifest-write:middle",
    "manifest-write:after",
    "manifest-fsync:after",
    "checksum-write:after",
    "temp-fsync:after",
    "intent-write:before",
    "intent-write:after",
    *OVERWRITE,
    "rename:before",
    "rename:after",
    "rename-fsync:after",
    "latest:before",
    "latest:after",
    "latest-fsync:after",
    "remove-old:middle",
    "remove-old:after",
    "prune:after",
)
POINTS = (*EVERY_RANK, *RANK_ZERO)

Reach = Callable[[str], None]
"""Called with the name of a point when a save gets there."""


def armed(rank: int, spec: str | None) -> Reach:
    """What a save calls at each point: nothing happens, unless ``spec`` is ``"<point>@<rank>"`` of this one."""
    if not spec:
        return _pass
    point, _, wanted = spec.partition("@")
    if point not in POINTS:
        raise AssertionError(f"there is no fault point {point!r}; there are {', '.join(POINTS)}")

    def reach(name: str) -> None:
        if name == point and rank == int(wanted):
            os.kill(os.getpid(), signal.SIGKILL)

    return reach


def _pass(name: str) -> None:
    if name not in POINTS:
        raise AssertionError(f"{name!r} is not in the list of fault points")
