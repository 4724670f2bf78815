"""The order of an indexed dataset in each epoch, the same on all ranks."""

from __future__ import annotations

import ctypes
import operator
import zlib
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import torch

from shardline.data.seeds import derive, outer_states_kept, seed_all
from shardline.errors import DataError, shown
from shardline.runtime.memory import host_bytes
from shardline.runtime.modes import outside_modes

__all__ = ["SampleOrder", "length_of", "permutation"]


def length_of(dataset: Any) -> int:
    """``len(dataset)``.

    Raises:
        DataError: it fails, or gives no number of samples.
    """
    try:
        return len(dataset)
    except Exception as error:
        raise DataError(
            f"len() of the dataset {type(dataset).__name__} failed ({type(error).__name__}: {shown(error, 200)}). It "
            f"must be the number of its samples, an integer from 0."
        ) from error


def _check_memory(dataset: Any, length: int) -> None:
    """Refuse a length whose order no memory of this host can hold."""
    needed, there = 8 * length, host_bytes()
    if there is not None and needed > there:
        raise DataError(
            f"len() of the dataset {type(dataset).__name__} is {length}: the order of so many samples needs {needed} "
            f"bytes, and this host has {there}. If the dataset really has so many, let it be iterable."
        )


@outside_modes
def permutation(length: int, seed: int, epoch: int) -> torch.Tensor:
    """The shuffled order of an epoch: each of 0..length-1 once, int64, decided by (seed, epoch)."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(derive(seed, epoch)))


@outside_modes
def _in_order(length: int) -> torch.Tensor:
    return torch.arange(length)


@outside_modes
def _listed(indices: list[int]) -> torch.Tensor:
    return torch.tensor(indices, dtype=torch.int64)


class SampleOrder:
    """Indices of each epoch: a sampler's, else a permutation, else 0, 1, 2 and so on."""

    def __init__(self, dataset: Any, sampler: Iterable[int] | None, seed: int, shuffle: bool) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.seed = seed
        self.shuffle = shuffle
        self._latest: tuple[int, torch.Tensor] | None = None
        self._crc: tuple[int, int] | None = None

    def length(self, epoch: int) -> int:
        """Samples in the epoch. Without a sampler it is that of the dataset, and no order is made."""
        if self.sampler is not None:
            return len(self.indices(epoch))
        length = length_of(self.dataset)
        _check_memory(self.dataset, length)
        return length

    def indices(self, epoch: int) -> torch.Tensor:
        """All indices of the epoch, int64, 1-D. The latest epoch asked for is kept: 8 bytes a sample."""
        if self._latest is None or self._latest[0] != epoch:
            self._latest = (epoch, self._compute(epoch))
            self._crc = None
        return self._latest[1]

    def crc(self, epoch: int) -> int:
        """The CRC-32 of all indices of the epoch, to compare with other ranks' at each step."""
        if self._crc is None or self._crc[0] != epoch:
            indices = self.indices(epoch).contiguous()
            memory = (ctypes.c_char * indices.nbytes).from_address(indices.data_ptr())  # Tensor.numpy needs NumPy
            self._crc = (epoch, zlib.crc32(memory))
        return self._crc[1]

    def digest(self, epoch: int) -> str:
        """A short digest of the first indices: another order (shuffle, sampler, torch's permutation) has another."""
        return blake2b(repr(self.indices(epoch)[:1024].tolist()).encode(), digest_size=8).hexdigest()

    def _compute(self, epoch: int) -> torch.Tensor:
        if self.sampler is not None:
            return self._sampled(self.sampler, epoch)
        length = self.length(epoch)
        return permutation(length, self.seed, epoch) if self.shuffle else _in_order(length)

    def _sampled(self, sampler: Iterable[int], epoch: int) -> torch.Tensor:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        with outer_states_kept():
            seed_all(derive(self.seed, epoch))
            indices = list(sampler)
        try:
            return _listed([operator.index(index) for index in indices])
        except TypeError as error:
            raise DataError(
                f"The sampler {type(sampler).__name__} gives something that is not an index ({error}). "
                "It must give one integer per sample; the loader makes batches of them itself."
            ) from error
