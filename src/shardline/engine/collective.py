"""Calls that every rank makes together: which one a rank is in is written down, for those who wait for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

__all__ = ["collective"]

F = TypeVar("F", bound=Callable[..., Any])


def collective(method: F) -> F:
    """Write down that the main thread is in ``method``, of an object with a ``comm``, while it runs."""
    name = method.__name__

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.comm.watch.status.call(name):
            return method(self, *args, **kwargs)

    return cast(F, call)
