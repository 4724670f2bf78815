"""The gradient norm: exact in fp32 at any size, and its sum over ranks the same on all of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["clip_divisor", "square_sum"]

_ROW = 16_384
"""``vector_norm`` in fp32 over one long vector is off by 5e-3 at 67M elements; over rows of this length by 5e-8."""


def square_sum(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    """The sum of squares of all elements of ``gradients`` (1-D each) as a float64 scalar on ``device``.

    It is not finite exactly when an element is not, or when the norm of a row passes 1.8e19 (its square the largest
    fp32), which must skip the step, too. So one pass gives the clip factor and the overflow flag.
    """
    norms: list[Tensor] = []
    for gradient in gradients:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        cut = gradient.numel() - gradient.numel() % _ROW
        if cut:
            norms.append(torch.linalg.vector_norm(gradient[:cut].view(-1, _ROW), dim=1, dtype=wide))
        if cut < gradient.numel():
            norms.append(torch.linalg.vector_norm(gradient[cut:], dtype=wide).view(1))
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.cat(norms).double().square().sum()


def clip_divisor(norm: Tensor, limit: float) -> Tensor:
    """What gradients of norm ``norm`` are divided by so that their norm is at most ``limit``: a 0-dim tensor >= 1.

    ``max(1, (norm + 1e-6) / limit)``; no limit (0) gives 1.
    """
    if not limit:
        return torch.ones_like(norm)
    return ((norm + 1e-6) / limit).clamp(min=1.0)
