"""Memory over one step: bytes in use, looked at again and again on a thread."""

from __future__ import annotations

import threading
import time

import torch

from shardline.events import MemoryOverStep
from shardline.runtime.memory import allocated_bytes

__all__ = ["MemoryTrace"]

_LOOKS = 150


class MemoryTrace:
    """Looks at what is allocated on ``device``, in a process on CPU all that it has, until :meth:`end`.

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
        while not self._over.wait(self._pause):
            self._looks.append((time.perf_counter() - self._begin, allocated_bytes(self._device)))

    def phase(self, name: str, begin: float, end: float) -> None:
        """``name`` has run from ``begin`` to ``end`` of the host's clock."""
        self._phases.append((name, begin - self._begin, end - self._begin))

    def end(self, step: int) -> MemoryOverStep:
        """The step, of number ``step``, is over."""
        self._over.set()
        self._thread.join()
        seconds, used = zip(*self._looks, strict=True) if self._looks else ((), ())
        return MemoryOverStep(step, list(seconds), list(used), self._phases)
