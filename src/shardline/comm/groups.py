"""Which ranks talk to each other, and the process groups over which they do."""

from __future__ import annotations

import atexit
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Protocol
from weakref import WeakSet

import torch
import torch.distributed as dist

__all__ = ["Group", "ProcessGroups", "release_at_exit"]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Group:
    """The place of this process in a group of ranks."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Group:
        """The place in ``group``; without one this is a single process."""
        return cls() if group is None else cls(dist.get_rank(group), dist.get_world_size(group))


class ProcessGroups:
    """The process groups that the engine makes for itself among the ranks of ``parent``.

    Attributes:
        made: those that were made and not destroyed.
        timeout: of their collectives; None for torch's default.
    """

    def __init__(self, parent: dist.ProcessGroup, device: torch.device, timeout: timedelta | None = None) -> None:
        self.made: list[dist.ProcessGroup] = []
        self.timeout = timeout or _timeout_of(parent, device) or _timeout_of(parent, _CPU)
        self._ranks = dist.get_process_group_ranks(parent)
        # Ranks outside of a mesh do not come here, so only its own can take part. Among all ranks the ordinary way is
        # safer: names of groups made locally come back after a destroy, with addresses of the old ones.
        self._local = len(self._ranks) < dist.get_world_size()

    def make(self, backend: str | None) -> dist.ProcessGroup:
        """A new group; ``None`` for the backends of the default group. Collective."""
        group = dist.new_group(
            self._ranks, timeout=self.timeout, backend=backend, use_local_synchronization=self._local
        )
        self.made.append(group)
        return group  # type: ignore[no-any-return]

    def destroy(self) -> None:
        while self.made:
            with suppress(ValueError):  # the script has ended all groups before
                dist.destroy_process_group(self.made.pop(0))


class Releasable(Protocol):
    """Holds references to process groups."""

    def release(self) -> None: ...


_OPEN: WeakSet[Releasable] = WeakSet()


def release_at_exit(owner: Releasable) -> None:
    """Let ``owner`` drop its process groups before ``init_distributed`` ends them.

    The last reference to a group ends its threads. An engine that was not destroyed would keep them for longer.
    """
    _OPEN.add(owner)
    _register()


@cache
def _register() -> None:
    # The hook of init_distributed is older, so it runs after this one.
    def release_all() -> None:
        for owner in list(_OPEN):
            owner.release()

    atexit.register(release_all)


def _timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta | None:
    """How long collectives of ``group`` on ``device`` wait for a rank; None if it has no backend there."""
    try:
        return group._get_backend(device).options._timeout
    except (RuntimeError, AttributeError):
        return None
