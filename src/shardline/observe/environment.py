"""Where a run takes place: versions, host and devices, as values for a report."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

import torch

from shardline._version import __version__

__all__ = ["environment"]


def environment(device: torch.device, ranks: int) -> dict[str, Any]:
    """What a reader of a report asks first. Nothing of it names the user or holds a secret."""
    on_cpu = device.type == "cpu"
    found: dict[str, Any] = {
        "shardline": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "host": platform.node(),
        "ranks": ranks,
        "device": _processor() if on_cpu else _device_name(device),
        "processors": os.cpu_count(),
        "threads per rank": torch.get_num_threads(),
    }
    if torch.version.cuda is not None and not on_cpu:
        found["cuda"] = torch.version.cuda
    return found


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _processor() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
