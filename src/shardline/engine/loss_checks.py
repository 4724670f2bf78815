"""Finds what a plain PyTorch loop has done to its loss before ``engine.backward``: a GradScaler, a division.

The graph of the loss shows it: its last few nodes multiply or divide by a number.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shardline.engine.notices import Notices

__all__ = ["LossChecks", "grad_scale", "is_divided_by", "is_scaled_by", "is_some_loss_scaled"]

_TIMES, _OVER = "MulBackward0", "DivBackward0"

_DEPTH = 4
"""Nodes to look at: ``scaler.scale(loss / n)`` and the like."""


class LossChecks:
    """Finds the scale of a GradScaler in a loss, and emits notices about it and about a division that counts twice.

    Attributes:
        grad_scale: of a GradScaler in the loop (0-dim), or ``None``. The first loss decides.
    """

    def __init__(self, notices: Notices) -> None:
        self.grad_scale: Tensor | None = None
        self._notices = notices
        self._saw_loss = self._saw_plain = False

    def scale_of(self, loss: Tensor, divisor: int) -> Tensor | None:
        """The scale of a GradScaler in ``loss``, which the caller takes out. ``divisor``: of the engine."""
        if self._saw_loss:
            known = self.grad_scale
            return known if known is not None and is_scaled_by(loss, known) else None
        self._saw_loss = True
        self.grad_scale = grad_scale(loss)
        if self.grad_scale is not None:
            self._notices.once(
                "engine.backward was given scaler.scale(loss) of a torch.amp.GradScaler; the scale was taken out "
                "again. Remove the scaler: loss.backward(), scaler.step and scaler.update have no meaning here."
            )
        if divisor > 1 and is_divided_by(loss, divisor):
            self._notices.once(
                f"the loss given to engine.backward was divided by {divisor} already, and is divided by the "
                f"{divisor} accumulation steps once more. Remove the division, or pass scale_wrt_gas=False."
            )
        return self.grad_scale

    def see_plain_backward(self, loss_scale: float) -> None:
        """A plain ``loss.backward()`` runs, or gradients were set by hand; ``loss_scale`` is what they lack."""
        if not self._saw_plain:
            self._saw_plain = True
            if is_some_loss_scaled():
                self._notices.once(
                    "gradients came by a plain loss.backward(), and a torch.amp.GradScaler is in use: if it scaled "
                    "this loss, they are too large by its scale. Remove it, and call engine.backward(loss)."
                )
        if loss_scale != 1.0:
            self._notices.once(
                "gradients of fp16 came without the loss scale, by a plain loss.backward() or set by hand: they count, "
                "but what is below 6e-8 on its way is lost. engine.backward(loss) multiplies the loss by the scale."
            )


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
