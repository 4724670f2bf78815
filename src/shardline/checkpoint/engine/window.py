"""Snapshot of random states, buffers and positions of loaders at the start of the accumulation window.

A save inside the window holds them: weights and optimizer state do not change there, but random numbers are drawn and
modules update their buffers. A resume replays the window, so it must begin with those of its start.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shardline.checkpoint.engine.loaders import Loaders
from shardline.checkpoint.engine.randomness import RandomState
from shardline.data.split import Position
from shardline.plan.describe import persistent_buffers

__all__ = ["WindowStart"]


class WindowStart:
    """Random states and buffers at the start of a window. Unchanged buffers are not copied again.

    Attributes:
        random: random states.
        position: of the engine's loader.
        loaders: those that the user brings.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module, self._device = module, device
        self._copies: dict[int, tuple[Tensor, int, Tensor]] = {}  # id: buffer, its version then, its values then
        self.random: RandomState | None = None
        self.position: Position | None = None
        self.loaders = Loaders()

    def begin(self, position: Position | None) -> None:
        """The window before is over, and nothing was drawn for the next one."""
        self.mark(position)
        self.loaders.begin_window()

    def mark(self, position: Position | None) -> None:
        """The window begins now. Costs some microseconds, and a copy of the buffers that have changed.

        Args:
            position: of the engine's loader.
        """
        self.position = position
        self.random = RandomState.now(self._device)
        seen: dict[int, tuple[Tensor, int, Tensor]] = {}
        stale_copies, stale = [], []
        for _, buffer in persistent_buffers(self._module):
            if id(buffer) in seen:
                continue
            known = self._copies.get(id(buffer))
            if known is None or known[0] is not buffer or known[2].shape != buffer.shape:
                seen[id(buffer)] = (buffer, buffer._version, buffer.detach().clone())
                continue
            if known[1] != buffer._version:
                stale_copies.append(known[2])
                stale.append(buffer.detach())
            seen[id(buffer)] = (buffer, buffer._version, known[2])
        if stale:
            torch._foreach_copy_(stale_copies, stale)
        self._copies = seen

    def buffers(self) -> dict[str, Tensor]:
        """The persistent buffers as they were, by name."""
        return {
            name: self._copies[id(buffer)][2] if id(buffer) in self._copies else buffer.detach()
            for name, buffer in persistent_buffers(self._module)
        }
