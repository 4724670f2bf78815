"""How much memory this process uses, in bytes."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["allocated_bytes", "host_bytes", "peak_bytes", "resident_bytes"]


def host_bytes() -> int | None:
    """Memory of this host; None if the system does not report it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


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


def allocated_bytes(device: torch.device) -> int:
    """Bytes allocated and not freed now: by torch on an accelerator, by all of this process on CPU.

    If the C library does not report it, it is the resident memory.
    """
    if device.type != "cpu":
        return torch.accelerator.memory.memory_allocated(device)
    if _mallinfo is None:
        return resident_bytes()
    found = _mallinfo()
    return int(found.uordblks + found.hblkhd)


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


def _find_mallinfo() -> Callable[[], Any] | None:
    """glibc's count over all arenas, since 2.33."""
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is not None:
        function.restype = _Mallinfo
    return function


_mallinfo = _find_mallinfo()


def _field(name: str) -> int:
    # not getrusage: its peak is inherited through fork and exec, so a launcher's would count as the rank's own
    file = os.open("/proc/self/status", os.O_RDONLY)
    try:
        text = os.read(file, 1 << 16)
    finally:
        os.close(file)
    _, found, rest = text.partition(f"{name}:".encode())
    if not found:
        raise LookupError(f"/proc/self/status has no {name}")
    return int(rest.split(maxsplit=1)[0]) * 1024
