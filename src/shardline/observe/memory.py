"""Memory over one step: bytes in use, looked at a hundred times on a thread."""

from __future__ import annotations

import threading
import time

import torch

from shardline.events import MemoryOverStep
from shardline.runtime.memory import resident_bytes

__all__ = ["MemoryTrace"]

_LOOKS = 150


class MemoryTrace:
    """Looks at the memory of this process, or at what is allocated on ``device``, until :meth:`end`.

    Args:
        seconds: how long the step is expected to take.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self._device = device
        self._pause = max(seconds / _LOOKS, 5e-4)
        self._over = threading.Event()
        self._looks: list[tuple[float, int]] = []
        self._phases: list[tuple[str, float, float]] = []
        self._begin = time.perf_counter()
        self._thread = threading.Thread(target=self._run, name="shardline-memory", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        on_host = self._device.type == "cpu"
        while not self._over.wait(self._pause):
            used = resident_bytes() if on_host else torch.accelerator.memory.memory_allocated(self._device)
            self._looks.append((time.perf_counter() - self._begin, used))

    def phase(self, name: str, begin: float, end: float) -> None:
        """``name`` has run from ``begin`` to ``end`` of the host's clock."""
        self._phases.append((name, begin - self._begin, end - self._begin))

    def end(self, step: int) -> MemoryOverStep:
        """The step, of number ``step``, is over."""
        self._over.set()
        self._thread.join()
        seconds, used = zip(*self._looks, strict=True) if self._looks else ((), ())
        kind = "resident" if self._device.type == "cpu" else "allocated"
        return MemoryOverStep(step, kind, list(seconds), list(used), self._phases)
