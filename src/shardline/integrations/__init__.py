"""Trainers of other packages, with an engine of :func:`shardline.shard` behind them. Each needs its package."""

from __future__ import annotations

from importlib import import_module

from shardline.errors import UsageError

__all__ = ["require"]


def require(package: str, what: str) -> None:
    """Import ``package``, for ``what``.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package.partition(".")[0]:
            raise
        raise UsageError(
            f"{what} needs the package {package.partition('.')[0]!r}, which is not installed. Install it, or all that "
            f"Shardline works with: pip install 'shardline[integrations]'."
        ) from None
