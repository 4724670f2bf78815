"""Checkpoints by name and range: written by all ranks, committed at one point, read by any layout, never unpickled.

Public are :func:`read` and :mod:`shardline.checkpoint.interchange`; the rest is reached through the engine and
``shardline checkpoint``. Names are imported when they are first used: a look at a directory of checkpoints must not
import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardline.checkpoint.format.snapshot import Snapshot, read

__all__ = ["Snapshot", "read"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from shardline.checkpoint.format import snapshot

    return getattr(snapshot, name)
