"""State dicts as ``torch.save`` should get them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["clone_tensors_for_torch_save"]


def clone_tensors_for_torch_save(item: Any, device: torch.device | str | None = torch.device("cpu")) -> Any:  # noqa: B008
    """``item`` with every tensor copied to ``device``: a view would be saved with all that it is a view of."""
    if isinstance(item, Tensor):
        return item.detach().clone().to(device if device is not None else item.device)
    if isinstance(item, list | tuple):
        return type(item)(clone_tensors_for_torch_save(each, device) for each in item)
    if isinstance(item, dict):
        return type(item)({key: clone_tensors_for_torch_save(value, device) for key, value in item.items()})
    return item
