"""Batches of a user's own loader that seem smaller than the others: they lead to a notice only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["ShortBatches"]


class ShortBatches:
    """Looks at dimension 0 of the first tensor that the model is given.

    That it is the batch cannot be known (sequences may come first, or the nodes of graphs), so nothing is computed from
    it. It is taken to be so while it is the configured micro-batch size at every forward; the first other size decides.

    Attributes:
        full: that micro-batch size.
    """

    def __init__(self, full: int) -> None:
        self.full = full
        self._sure = False
        self._over = False
        self._found: int | None = None

    def see(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The arguments of a forward."""
        if self._over:
            return
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()), None)
        samples = None if first is None else first.shape[0]
        if samples == self.full:
            self._sure = True
            return
        self._over = True
        if samples is not None and self._sure and samples < self.full:
            self._found = samples

    def pop(self) -> int | None:
        """How many samples the smaller batch has, once."""
        samples, self._found = self._found, None
        return samples
