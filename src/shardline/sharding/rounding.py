"""Frozen weights in low precision that are edited again and again without effect: rounding loses what is added."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RoundingWatch"]

_EDITS = 50
"""Edits to watch. What a moving average adds in one edit may be lost and appear later, but not over so many edits."""

_SAMPLE = 4096
"""Elements to watch."""


class RoundingWatch:
    """Watches one parameter over its edits."""

    def __init__(self) -> None:
        self._remaining = _EDITS
        self._last: Tensor | None = None
        self._moved: Tensor | None = None

    def edited(self, elements: Tensor, *, certain: bool) -> bool:
        """The parameter, flat, after one more edit. Returns, once at most, whether most of it never moved.

        Args:
            certain: whether it was edited; else it was perhaps only read.
        """
        if not self._remaining:
            return False
        sample = elements[:_SAMPLE].clone()
        if self._last is None or self._moved is None:
            self._last, self._moved = sample, torch.zeros_like(sample, dtype=torch.bool)
            return False
        self._moved |= sample != self._last
        self._last = sample
        self._remaining -= 1
        if self._remaining:
            return False
        moved = float(self._moved.float().mean())  # the one time that the host waits for the device
        self._last = self._moved = None
        return moved < 0.5 and (moved > 0 or certain)
