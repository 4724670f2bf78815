"""What a loop written for plain PyTorch may still do to the loss that it gives to ``engine.backward``.

A loss does not tell what was done to it, but its graph does: the last few nodes multiply or divide it by a number.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["grad_scale", "is_divided_by", "is_scaled_by", "is_some_loss_scaled"]

_TIMES, _OVER = "MulBackward0", "DivBackward0"

_DEPTH = 4
"""Nodes to look at: ``scaler.scale(loss / n)`` and its kin."""


def grad_scale(loss: Tensor) -> Tensor | None:
    """The scale (0-dim) by which a :class:`torch.amp.GradScaler` multiplied ``loss``, if one did.

    Looks through all objects of the process: not for every step.
    """
    for node, number in _numbers(loss):
        if node == _TIMES and number.dtype is torch.float32 and _is_of_a_scaler(number):
            return number
    return None


def is_some_loss_scaled() -> bool:
    """Whether a :class:`torch.amp.GradScaler` of this process has scaled anything.

    Looks through all objects of the process: not for every step.
    """
    scalers = [each for each in gc.get_objects() if issubclass(type(each), torch.amp.GradScaler)]
    return any(scaler.is_enabled() and scaler._scale is not None for scaler in scalers)


def is_scaled_by(loss: Tensor, scale: Tensor) -> bool:
    """Whether ``loss`` was multiplied by ``scale``, a tensor that :func:`grad_scale` has found before."""
    return any(number is scale for _, number in _numbers(loss))


def is_divided_by(loss: Tensor, steps: int) -> bool:
    """Whether ``loss`` was divided by the number ``steps``."""
    wanted = {_TIMES: 1.0 / steps, _OVER: float(steps)}
    known = ((node, number) for node, number in _numbers(loss) if number.device.type == "cpu")  # others: a wait
    return any(float(number) == wanted[node] for node, number in known)


def _numbers(loss: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What ``loss`` was multiplied or divided by, the last first, as the node that did it and the number."""
    node: Any = loss.grad_fn
    for _ in range(_DEPTH):
        name = "" if node is None else node.name()
        if name == "ToCopyBackward0":
            node = node.next_functions[0][0]
            continue
        if name not in (_TIMES, _OVER):
            return
        (left, _), (right, _) = node.next_functions
        number = node._saved_other if right is None else node._saved_self if name == _TIMES and left is None else None
        if number is None or number.numel() != 1:
            return
        yield name, number
        node = left or right


def _is_of_a_scaler(scale: Tensor) -> bool:
    """Whether ``scale`` is the one that a GradScaler keeps."""
    for holder in gc.get_referrers(scale):
        if isinstance(holder, torch.amp.GradScaler):
            return True
        if isinstance(holder, dict) and holder.get("_scale") is scale and "_growth_tracker" in holder:
            return True
    return False
