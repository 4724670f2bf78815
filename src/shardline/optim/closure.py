"""The closure that a caller may give to an optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["evaluate"]

T = TypeVar("T")


def evaluate(closure: Callable[[], T] | None) -> T | None:
    """What ``closure`` returns, called with gradients enabled; ``None`` without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
