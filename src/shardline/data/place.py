"""Where each rank is in the data: the same place on all, since each has a piece of one and the same global batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from shardline.data.loader import Loader

__all__ = ["LoaderPlace"]


class LoaderPlace:
    """Reads the place of the engine's loader, where there is one."""

    advice = (
        "Take as many batches from the engine's loader on every rank, of the same dataset. To look at a batch on one "
        "rank, keep loader.state_dict() and load it again afterwards."
    )

    def __init__(self, loader: Callable[[], Loader | None]) -> None:
        self._loader = loader

    def read(self) -> tuple[Sequence[Any], Sequence[Tensor]]:
        loader = self._loader()
        return () if loader is None else loader.place(), ()

    def names(self, values: Sequence[Any], tensors: Sequence[float]) -> Mapping[str, str]:
        if not values:
            return {"the engine's loader": "none"}
        epoch, batch, micro, size, order = values
        return {
            "the next batch of the engine's loader": f"micro-step {micro} of global batch {batch} of epoch {epoch}",
            "the size of its global batch": "unknown" if size is None else f"{size} samples",
            "the order of its epoch": "unknown" if order is None else f"one with the digest {order:08x}",
        }
