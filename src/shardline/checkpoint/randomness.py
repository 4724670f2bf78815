"""This rank's random generators as plain values and tensors: Python's, NumPy's, torch's on CPU and on the device."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardline.data.seeds import derive, seed_all

__all__ = ["RandomState"]


@dataclass(frozen=True)
class RandomState:
    """The states of the global generators. Taking one costs some 20 microseconds.

    Attributes:
        values: JSON values: Python's state, and NumPy's where it is imported.
        cpu: torch's CPU generator (uint8).
        device: the device's generator (uint8), or ``None`` on CPU.
    """

    python: tuple[Any, ...]
    numpy: tuple[Any, ...] | None
    cpu: Tensor
    device: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        numpy = sys.modules.get("numpy")
        return cls(
            random.getstate(),
            numpy.random.get_state() if numpy else None,
            torch.default_generator.get_state(),
            None if device.type == "cpu" else _device_module(device).get_rng_state(device),
        )

    def restore(self, device: torch.device) -> None:
        """Make the generators go on from here."""
        random.setstate(self.python)
        numpy = sys.modules.get("numpy")
        if numpy and self.numpy is not None:
            numpy.random.set_state(self.numpy)
        torch.default_generator.set_state(self.cpu)
        if self.device is not None and device.type != "cpu":
            _device_module(device).set_rng_state(self.device, device)

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state as tensors by key, and what is left as JSON values."""
        version, words, gauss = self.python
        tensors = {"random/python": torch.tensor(words, dtype=torch.int64), "random/cpu": self.cpu}
        values: dict[str, Any] = {"python": [version, None if gauss is None else float(gauss).hex()]}
        if self.numpy is not None:
            kind, keys, position, has_gauss, cached = self.numpy
            tensors["random/numpy"] = torch.tensor([int(key) for key in keys], dtype=torch.int64)
            values["numpy"] = [kind, int(position), int(has_gauss), float(cached).hex()]
        if self.device is not None:
            tensors["random/device"] = self.device
        return tensors, values

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], values: dict[str, Any]) -> RandomState:
        """The inverse of :meth:`to_tensors`."""
        version, gauss = values["python"]
        python = (version, tuple(tensors["random/python"].tolist()), None if gauss is None else float.fromhex(gauss))
        state = None
        numpy = sys.modules.get("numpy")
        if numpy and "numpy" in values:
            kind, position, has_gauss, cached = values["numpy"]
            keys = numpy.array(tensors["random/numpy"].tolist(), dtype=numpy.uint32)
            state = (kind, keys, position, has_gauss, float.fromhex(cached))
        return cls(python, state, tensors["random/cpu"], tensors.get("random/device"))


def derive_states(seed: int, step: int, rank: int) -> None:
    """Seed this rank's generators for a run that goes on from ``step`` at another world size."""
    word = derive(seed, step, rank)
    seed_all(word)
    torch.manual_seed(word)  # the device's as well


def _device_module(device: torch.device) -> Any:
    return torch.get_device_module(device)
