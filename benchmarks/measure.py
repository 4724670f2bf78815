"""What a process can say of itself: its memory, page by page counted fairly, and what it runs on.

Memory of a rank is resident memory above the process's base (after imports, the process group and a few steps of a
tiny model; before the model is made). A page of shared memory counts once for all that map it. The peak is the kernel's
own high-water mark of resident memory (``VmHWM``, reset by writing 5 to ``/proc/self/clear_refs``), with shared
memory counted like that as it is at the end of the window.
"""

from __future__ import annotations

import mmap
import os
import platform
import sys
from pathlib import Path

import torch

MB = 1e6


def resident() -> float:
    """Bytes of this process in memory now, each shared page divided by the number of processes that map it."""
    return _field("status", "VmRSS") + _correction()


def peak() -> float:
    """Most bytes since :func:`restart_peak`."""
    return _field("status", "VmHWM") + _correction()


def restart_peak() -> None:
    """Begin a new peak at what is in memory now."""
    Path("/proc/self/clear_refs").write_text("5")


def touch_free_memory(size: int = 1 << 30) -> None:
    """Write to ``size`` bytes of free memory and give them back.

    The host of a virtual machine may have taken free memory back; the process that touches it first waits for the host.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    torch.frombuffer(memory, dtype=torch.uint8)[:: mmap.PAGESIZE].fill_(1)
    memory.close()


def available() -> bool:
    """Whether this system tells: Linux does."""
    return sys.platform == "linux"


def _correction() -> float:
    return _field("smaps_rollup", "Pss_Shmem") - _field("status", "RssShmem")


def _field(file: str, name: str) -> float:
    for line in Path("/proc/self", file).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0.0


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")]  # fmt: skip
        cpu = f"{names[0]}, {len(names)} cores" if names else cpu
    return {"cpu": cpu, "python": platform.python_version(), "torch": torch.__version__,
            "load before": f"{os.getloadavg()[0]:.2f}"}  # fmt: skip
