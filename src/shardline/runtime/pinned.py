"""Page-locked host memory of exactly the size that is asked for.

torch's own allocator rounds every request up to a power of two, and so takes up to twice the memory. On CUDA ordinary
memory is registered instead.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from typing import Any

import torch
from torch import Tensor

from shardline.errors import UsageError

__all__ = ["empty_pinned"]

_PORTABLE = 1
"""CUDA's flag for memory that is page-locked for every device of the process."""


class _Locked(mmap.mmap):
    """Memory that is page-locked for as long as it is there; the tensors in it keep it."""

    _runtime: Any = None

    def lock(self, device: torch.device) -> None:
        runtime = torch.cuda.cudart()
        self._address = torch.frombuffer(self, dtype=torch.uint8).data_ptr()
        code = runtime.cudaHostRegister(self._address, len(self), _PORTABLE)
        if int(code) != 0:
            raise UsageError(
                f"the system did not page-lock {len(self)} bytes of host memory: {runtime.cudaGetErrorString(code)}. "
                f"Raise its limit (ulimit -l), or do without: set offload_optimizer.pin_memory to false, and save "
                f"without async_save."
            )
        self._runtime, self._device, self._process = runtime, device, os.getpid()

    def __del__(self) -> None:
        if self._runtime is None or self._process != os.getpid() or sys.is_finalizing():
            return
        torch.accelerator.synchronize(self._device)  # a copy that is queued may still use it
        self._runtime.cudaHostUnregister(self._address)


def empty_pinned(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat buffer in host memory with arbitrary contents, page-locked for copies from and to ``device``.

    Where ``device`` is the CPU it is ordinary memory. To lock memory takes long, and to give it back waits for the
    device: it is for what is kept.
    The owner must make sure that a queued copy is complete before the buffer is written again.

    Raises:
        UsageError: the system does not lock so much.
    """
    with torch.inference_mode(False):  # it may outlive that mode
        if device.type != "cuda" or not numel:
            return torch.empty(numel, dtype=dtype, pin_memory=device.type != "cpu")
        # Shared: after a fork a write to private memory would move it to another page than the one that is locked.
        memory = _Locked(-1, numel * dtype.itemsize, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError, AttributeError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        memory.lock(device)
        return torch.frombuffer(memory, dtype=dtype, count=numel)
