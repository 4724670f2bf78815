"""What the loss of the backward that runs was multiplied by: one factor for the whole graph.

A graph may hold several engines (the generator's loss goes through the discriminator) and much that is not an engine's.
What enters it at its root is multiplied once; each engine that receives gradients takes the factor out and its own in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["PLAIN", "multiplied", "multiplied_by"]

PLAIN = 1.0, True
"""A plain ``loss.backward()``: the loss is as the user made it."""

_applied: tuple[float, bool] = PLAIN


@contextmanager
def multiplied(factor: float, *, by_accumulation: bool) -> Iterator[None]:
    """Within it, a backward runs whose loss was multiplied by ``factor``.

    Args:
        factor: loss scale, weight of the batch and division by the accumulation steps, all in one.
        by_accumulation: whether the steps are divided by here, as opposed to by the user before.
    """
    global _applied
    before, _applied = _applied, (factor, by_accumulation)
    try:
        yield
    finally:
        _applied = before


def multiplied_by() -> tuple[float, bool]:
    """The factor of the backward that runs, and whether the division by the accumulation steps is part of it.

    ``(1.0, True)`` where no engine began it: what is missing of the factor includes the division.
    """
    return _applied
