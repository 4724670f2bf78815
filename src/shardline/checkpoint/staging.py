"""What a save in the background writes: copies on the host, in memory that is kept from save to save.

Weights and buffers can be edited at any moment, so they are copied at once. The optimizer's state changes in a step
only: it is copied behind the next forward, and a step waits for that.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from shardline.checkpoint.capture import is_state

__all__ = ["Staging"]


class Staging:
    """The copies of one save at a time."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._later: list[tuple[Tensor, Tensor]] = []
        self._done = threading.Event()
        self._done.set()

    def begin(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of ``tensors``; those of the optimizer's state have their values after :meth:`finish`."""
        self._kept = {key: self._place(key, tensor) for key, tensor in tensors.items()}
        self._later = [(self._kept[key], tensor) for key, tensor in tensors.items() if is_state(key)]
        _copy([(self._kept[key], tensor) for key, tensor in tensors.items() if not is_state(key)])
        self._done.clear()
        return dict(self._kept)

    def finish(self) -> None:
        """Copy what is left; on any thread."""
        try:
            _copy(self._later)
        finally:
            self.give_up()

    def give_up(self) -> None:
        """Nothing more is copied."""
        self._later = []
        self._done.set()

    def wait(self) -> None:
        """Return when the optimizer's state may change."""
        self._done.wait()

    def clear(self) -> None:
        """Let go of the memory."""
        self._kept.clear()

    def _place(self, key: str, tensor: Tensor) -> Tensor:
        kept = self._kept.get(key)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        return kept


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for target, source in pairs:
        target.copy_(source, non_blocking=True)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
