"""This rank's random generators as plain values and tensors: Python's, NumPy's, torch's on CPU and on the device."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardline.checkpoint.format.manifest import RandomEntry
from shardline.data.seeds import derive, seed_all
from shardline.errors import CheckpointError, shown

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
    def from_tensors(cls, tensors: Mapping[str, Tensor], entry: RandomEntry) -> RandomState:
        """The inverse of :meth:`to_tensors`. Generators that are given such a state go on from it: it was tried.

        Raises:
            CheckpointError: for tensors that are no states.
        """
        try:
            version, gauss = entry.python
            words = _words(tensors, "python", 625)
            python = (version, tuple(words), None if gauss is None else float.fromhex(gauss))
            random.Random().setstate(python)
            state = None
            numpy = sys.modules.get("numpy")
            if numpy and entry.numpy is not None:
                kind, position, has_gauss, cached = entry.numpy
                keys = numpy.array(_words(tensors, "numpy", 624), dtype=numpy.uint32)
                state = (kind, keys, position, has_gauss, float.fromhex(cached))
            cpu, device = tensors["random/cpu"], tensors.get("random/device")
            torch.Generator().set_state(cpu)
        except (KeyError, ValueError, TypeError, OverflowError, RuntimeError) as error:
            raise CheckpointError(f"the random states in the checkpoint are malformed ({shown(error)}).") from None
        return cls(python, state, cpu, device)


def _words(tensors: Mapping[str, Tensor], name: str, count: int) -> list[int]:
    """Those of a Mersenne twister, which does not check them itself."""
    tensor = tensors[f"random/{name}"]
    if tensor.dtype != torch.int64 or tensor.shape != (count,):
        raise ValueError(f"{name}'s has the shape {tuple(tensor.shape)} and {tensor.dtype}")
    if int(tensor.min()) < 0 or int(tensor.max()) >= 1 << 32:
        raise ValueError(f"{name}'s holds a word of more than 32 bits")
    words: list[int] = tensor.tolist()
    return words


def derive_states(seed: int, step: int, rank: int) -> None:
    """Seed this rank's generators for a run that goes on from ``step`` at another world size."""
    word = derive(seed, step, rank)
    seed_all(word)
    torch.manual_seed(word)  # the device's as well


def _device_module(device: torch.device) -> Any:
    return torch.get_device_module(device)
