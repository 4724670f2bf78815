"""What an uncaught error tells the other ranks, and the terminal."""

from __future__ import annotations

import sys
from functools import cache
from types import TracebackType

from shardline.errors import LostRankError, ShardlineError

__all__ = ["listen", "tell"]


@cache
def listen() -> None:
    """From now on the other ranks learn which error ends this process.

    A rank that fails because another one is lost prints its sentence alone: where it waited is in that, and the stack
    that helps is the other one's. Of ranks that are out of step, which all raise, the first prints a stack.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        tell(error)
        if isinstance(error, LostRankError):
            sys.stderr.write(f"shardline: {error}\n")
        elif isinstance(error, ShardlineError) and _is_shown_elsewhere(error):
            sys.stderr.write(f"shardline: {kind.__name__}: {error}\n")
        else:
            before(kind, error, trace)

    sys.excepthook = hook


def _is_shown_elsewhere(error: ShardlineError) -> bool:
    from shardline.watch.watch import open_watches

    return any(watch.rank > 0 and watch.lost == error.message for watch in open_watches())


def tell(error: BaseException) -> None:
    """Let the other ranks know that ``error`` ends this process."""
    from shardline.watch.watch import open_watches

    for watch in open_watches():
        watch.fail(error)
