"""What an uncaught error tells the other ranks, and the terminal."""

from __future__ import annotations

import re
import sys
from functools import cache
from types import TracebackType

import torch.distributed as dist

from shardline.errors import DisagreementError, LostRankError, ShardlineError

__all__ = ["GAVE_UP", "listen", "tell"]

GAVE_UP = re.compile(r"rank \d+ gave up: ")
"""How the error begins that a rank raises because another one has raised it."""


@cache
def listen() -> None:
    """From now on the other ranks learn which error ends this process.

    A rank that fails because of another one prints its sentence alone: the stack that helps is the other one's. Of
    ranks that disagree, which all raise, the first prints a stack.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        tell(error)
        if isinstance(error, LostRankError):
            if not _is_told(error):
                sys.stderr.write(f"shardline: {error}\n")
        elif isinstance(error, ShardlineError) and _is_shown_elsewhere(error):
            sys.stderr.write(f"shardline: {kind.__name__}: {error}\n")
        else:
            before(kind, error, trace)

    sys.excepthook = hook


def _is_told(error: LostRankError) -> bool:
    from shardline.watch.watch import open_watches

    return any(watch.told and watch.lost == error.message for watch in open_watches())


def _is_shown_elsewhere(error: ShardlineError) -> bool:
    if isinstance(error, DisagreementError):
        return dist.is_initialized() and dist.get_rank() > 0
    return GAVE_UP.match(error.message) is not None


def tell(error: BaseException) -> None:
    """Let the other ranks know that ``error`` ends this process."""
    from shardline.watch.watch import open_watches

    for watch in open_watches():
        watch.fail(error)
