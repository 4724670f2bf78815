"""``deepspeed.accelerator``: the device calls of scripts, where a CPU counts as an accelerator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardline.runtime.accelerator import Accelerator
from shardline.runtime.accelerator import get_accelerator as _get_accelerator
from shardline.runtime.topology import discover

__all__ = ["DeepSpeedAccelerator", "get_accelerator", "is_current_accelerator_supported"]

__path__: list[str] = []


class DeepSpeedAccelerator:
    """Shardline's calls on the device, and those that DeepSpeed's scripts make besides."""

    def __init__(self, device: Accelerator) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    @property
    def _name(self) -> str:
        return self._device.device_name()

    def is_available(self) -> bool:
        """True: there is always something to compute on."""
        return True

    def device_count(self) -> int:
        """Accelerators of this node; on CPU its processes."""
        return self._device.device_count() if self._device.is_available() else discover().local_world_size

    def is_synchronized_device(self) -> bool:
        """Whether calls return when they are done."""
        return not self._device.is_available()

    def on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.device.type == self._device.device_name()

    def pin_memory(self, tensor: Tensor, align_bytes: int = 1) -> Tensor:
        """Page-locked, where there is an accelerator to copy to."""
        return tensor.pin_memory() if self._device.is_available() else tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.is_pinned()

    def random(self) -> Any:
        """torch's module of random numbers."""
        return torch.random

    def initial_seed(self) -> int:
        return torch.initial_seed()

    def get_rng_state(self, device_index: int | None = None) -> Tensor:
        if not self._device.is_available():
            return torch.get_rng_state()
        return self._module().get_rng_state(self._device.device(device_index))  # type: ignore[no-any-return]

    def set_rng_state(self, new_state: Tensor, device_index: int | None = None) -> None:
        if self._device.is_available():
            self._module().set_rng_state(new_state, self._device.device(device_index))
        else:
            torch.set_rng_state(new_state)

    def supported_dtypes(self) -> list[torch.dtype]:
        kinds = [torch.float32]
        kinds += [torch.float16] if self._device.is_fp16_supported() else []
        return kinds + ([torch.bfloat16] if self._device.is_bf16_supported() else [])

    def range_push(self, msg: str) -> None:
        """Nothing: use torch.profiler."""

    def range_pop(self) -> None:
        """Nothing."""

    def _module(self) -> Any:
        return torch.get_device_module(self._device.device())


_ACCELERATOR = DeepSpeedAccelerator(_get_accelerator())


def get_accelerator() -> DeepSpeedAccelerator:
    """The calls on this machine's device."""
    return _ACCELERATOR


def is_current_accelerator_supported() -> bool:
    return True
