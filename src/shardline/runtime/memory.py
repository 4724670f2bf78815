"""How much memory this process uses, in bytes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

__all__ = ["peak_bytes", "resident_bytes"]


def peak_bytes(device: torch.device) -> int:
    """Most bytes in use so far: allocated by torch on an accelerator, resident in this process on CPU."""
    if device.type != "cpu":
        return torch.accelerator.memory.max_memory_allocated(device)
    if sys.platform == "linux":
        return _field("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def resident_bytes() -> int:
    """Bytes of this process that are in memory now (the peak, where the system gives no current figure)."""
    if sys.platform == "linux":
        return _field("VmRSS")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _field(name: str) -> int:
    # not getrusage: its peak is inherited through fork and exec, so a launcher's would count as the rank's own
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {name}")
