"""``state_dict()`` of a model of stage 3 that is not gathered: trainers ask for it when they save."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from shardline.errors import SealedError

__all__ = ["StateDict"]

logger = logging.getLogger("shardline")


class StateDict:
    """Stands in ``model.state_dict``. Where parameters are sharded, they are tensors on meta: they have no elements.

    DeepSpeed gives empty tensors there. Not collective, since rank 0 may call it alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        get = type(self._model).state_dict
        try:
            return get(self._model, *args, **kwargs)
        except SealedError:
            _say_sealed()
        found: dict[str, Any] = get(self._model, *args, **{**kwargs, "keep_vars": True})
        for name, value in found.items():
            found[name] = _detached(value) if isinstance(value, Tensor) else value
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> StateDict:
        return StateDict(memo[id(self._model)])  # a copy of the model has its own


def _detached(value: Tensor) -> Tensor:
    try:
        return value.detach()
    except SealedError:
        return torch.empty(value.shape, dtype=value.dtype, device="meta")


@cache
def _say_sealed() -> None:
    logger.warning(
        "model.state_dict(): sharded parameters are given without their elements, on meta. engine.full_state_dict() "
        "and engine.save_16bit_model() give them whole."
    )
