"""What a unit needs of host memory where its masters, reduced gradients and optimizer state are kept there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["HostMemory"]


class HostMemory(Protocol):
    """Moves shards between the device and the host; :class:`shardline.features.offload.Offload` is one."""

    @property
    def device(self) -> torch.device:
        """Where the states are."""

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat buffer of ``numel`` elements there, with arbitrary contents."""

    def copy_to_host(self, unit: int, shard: Tensor, then: Callable[[Tensor], None]) -> None:
        """Start to copy ``shard`` (1-D) of ``unit`` to the host, where ``then`` gets the copy."""

    def wait_for_copies(self) -> None:
        """Return when everything that is on its way down is there."""

    def copy_to_device(self, unit: int, master: Tensor, weights: Tensor) -> None:
        """Bring ``master``, rounded to the dtype of ``weights``, into ``weights`` on the device."""
