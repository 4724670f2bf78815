"""What a save in the background writes: copies on the host, in memory that is kept from save to save.

Weights and buffers can be edited at any moment, so they are copied at once. The optimizer's state changes in a step
only: it is copied behind the next forward, and a step waits for that.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from shardline.checkpoint.manifest import is_state
from shardline.errors import CheckpointError

__all__ = ["Staging"]


class Staging:
    """The copies of one save at a time."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._later: list[tuple[str, Tensor, int]] = []  # key, source, and its version
        self._error: Exception | None = None
        self._done = threading.Event()
        self._done.set()

    def begin(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of ``tensors``; those of the optimizer's state have their values after :meth:`finish`.

        It does not raise: the other ranks would wait for this one. :meth:`finish` does.
        """
        self._error = None
        try:
            self._kept = {key: self._place(key, tensor) for key, tensor in tensors.items()}
            _copy((self._kept[key], tensor) for key, tensor in tensors.items() if not is_state(key))
            self._later = [(key, tensor, tensor._version) for key, tensor in tensors.items() if is_state(key)]
            self._done.clear()
        except Exception as error:
            self._error = error
        return dict(self._kept)

    def finish(self) -> None:
        """Copy what is left; on any thread.

        Raises:
            CheckpointError: if the optimizer's state was changed meanwhile by something else than a step.
            Exception: what went wrong in :meth:`begin`.
        """
        if self._error is not None:
            raise self._error
        _copy((self._kept[key], source) for key, source, _ in self._later)
        for key, source, version in self._later:
            if source._version != version:
                raise CheckpointError(
                    f"{key!r} of the optimizer was changed while it was copied in the background. Call "
                    f"engine.checkpoints.wait() before you change it, or save without async_save."
                )
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
            with torch.inference_mode(False):  # it outlives that mode
                kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        return kept


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    devices = set()
    for target, source in pairs:
        target.copy_(source, non_blocking=True)
        devices.add(source.device)
    for device in devices:  # by name: another thread has another current device
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
