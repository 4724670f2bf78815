"""The device calls that training scripts make, with one meaning on every accelerator and on CPU.

They speak of the CPU where the engine computes on it: also on a machine with an accelerator, by SHARDLINE_DEVICE=cpu.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from shardline.runtime.memory import peak_bytes, resident_bytes
from shardline.runtime.topology import accelerators, default_backend

__all__ = ["Accelerator", "get_accelerator"]


class Accelerator:
    """Calls on this machine's kind of accelerator, by ``torch.accelerator``; on CPU they mean the CPU's equivalent.

    A device index of None is the current device. Memory is in bytes: allocated by torch on an accelerator, resident
    in this process on CPU.
    """

    def is_available(self) -> bool:
        """Whether there is an accelerator to compute on; on False everything here speaks of the CPU."""
        return accelerators().count > 0

    def device_name(self, device_index: int | None = None) -> str:
        """``"cuda"`` without an index, ``"cuda:1"`` with one, ``"cpu"`` on CPU."""
        if not self.is_available():
            return "cpu"
        kind = _current().type
        return kind if device_index is None else f"{kind}:{device_index}"

    def device(self, device_index: int | None = None) -> torch.device:
        """The device itself."""
        if not self.is_available():
            return torch.device("cpu")
        return torch.device(_current().type, self.current_device() if device_index is None else device_index)

    def device_count(self) -> int:
        """Number of visible accelerators; 1 on CPU."""
        return accelerators().count or 1

    def set_device(self, device_index: int) -> None:
        """Make this device the current one; nothing on CPU."""
        if self.is_available():
            torch.accelerator.set_device_index(device_index)

    def current_device(self) -> int:
        """Index of the current device; 0 on CPU."""
        return torch.accelerator.current_device_index() if self.is_available() else 0

    def current_device_name(self) -> str:
        """Name of the current device, with its index where it is an accelerator."""
        return self.device_name(self.current_device())

    def synchronize(self, device_index: int | None = None) -> None:
        """Wait for everything queued on the device; nothing on CPU."""
        if self.is_available():
            torch.accelerator.synchronize(device_index)

    def empty_cache(self) -> None:
        """Give memory that torch caches back to the device; nothing on CPU."""
        if self.is_available():
            torch.accelerator.memory.empty_cache()

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Bytes in use now."""
        if not self.is_available():
            return resident_bytes()
        return torch.accelerator.memory.memory_allocated(device_index)

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """Most bytes in use since the start or the last reset; on CPU always since the start."""
        return peak_bytes(self.device(device_index))

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        """Let :meth:`max_memory_allocated` start again; nothing on CPU, where the system keeps the peak."""
        if self.is_available():
            torch.accelerator.memory.reset_peak_memory_stats(device_index)

    def total_memory(self, device_index: int | None = None) -> int:
        """Bytes that the device, or this machine, has."""
        if not self.is_available():
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        total: int = _module().get_device_properties(self.device(device_index)).total_memory
        return total

    def available_memory(self, device_index: int | None = None) -> int:
        """Bytes that are free now, those that torch caches counted as used."""
        if not self.is_available():
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        free: int = _module().mem_get_info(self.device(device_index))[0]
        return free

    def manual_seed(self, seed: int) -> None:
        """Seed the generator of the current device."""
        if self.is_available():
            _module().manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed the generators of all devices."""
        if self.is_available():
            _module().manual_seed_all(seed)
        else:
            torch.manual_seed(seed)

    def communication_backend_name(self) -> str:
        """The process group backend for tensors on this device: ``"nccl"`` on CUDA, ``"gloo"`` on CPU."""
        return default_backend().rpartition(":")[2]

    def is_bf16_supported(self) -> bool:
        """Whether bf16 is computed by the hardware (CUDA) or at all (elsewhere)."""
        if self.device_name() == "cuda":
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        return True

    def is_fp16_supported(self) -> bool:
        """Whether fp16 can be computed with: everywhere torch runs."""
        return True


def _current() -> torch.device:
    current = torch.accelerator.current_accelerator()
    if current is None:
        raise AssertionError("torch has no accelerator here")
    return current


def _module() -> Any:
    """torch's module for the kind of accelerator: ``torch.cuda``, ``torch.xpu``."""
    return torch.get_device_module(_current())


_ACCELERATOR = Accelerator()


def get_accelerator() -> Accelerator:
    """The calls on this machine's accelerator; asking for them touches no device."""
    return _ACCELERATOR
