"""Flat storage: buffers that are borrowed and given back, and views of them in the shapes of parameters.

* :class:`BufferPool` lends flat buffers. One that is given back is lent again only when no other tensor uses its
  storage, so a view that a user (or autograd) still keeps never changes its values. On an accelerator the caching
  allocator already is such a pool.
* :func:`view` gives a parameter's range of a flat buffer in the parameter's own shape and strides.
"""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from shardline.plan import Entry

__all__ = ["BufferPool", "empty", "flat", "in_storage_order", "owns_its_memory", "view"]

_SMALLEST_KEPT = 1 << 16
"""Bytes below which a buffer is not kept: malloc serves these from memory that is already mapped."""

_SLACK = 1.75
"""How many times larger than the request a free buffer may be: units of nearly one size then share a few buffers."""

_LASTING_SLACK = 1.1
"""The same for buffers of which many are alive at once."""

_TRIES = 20
"""How often to look, every 0.1 ms, for a buffer that will be free soon: new memory costs page faults for all of it."""

_READERS_SECONDS = 1.0
"""How long to wait for other ranks that read a buffer: they release it at their next transition."""

_LARGE_PAGE = 2 << 20
"""Bytes of a large page of the system, and of the smallest buffer that uses them."""


def empty(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat buffer with arbitrary contents; on CPU of large pages, where the system has them.

    Filling new memory by pages of 4 KB takes several times as long as by pages of 2 MB, and so does another rank's
    reading of it.
    """
    size = numel * dtype.itemsize
    # Buffers outlive the inference_mode in which one may first be needed, so they must not be inference tensors.
    with torch.inference_mode(False):
        if device.type != "cpu" or size < _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(numel, dtype=dtype, device=device)
        memory = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _LARGE_PAGE
        # The end stays in small pages: a large one would take memory that is not used.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE, first, size // _LARGE_PAGE * _LARGE_PAGE)
        return torch.frombuffer(memory, dtype=dtype, count=numel, offset=first)


class BufferPool:
    """Lends flat 1-D buffers on one device.

    Giving 64 MB back to the system and taking it again costs about ten times as long as filling it, in page faults, so
    on CPU memory is kept. The best-fitting free storage is lent. A new storage is as large as the largest buffer that
    it may serve, so that few serve all.

    Args:
        device: of the buffers.
        wait_for_readers: waits, at most so many seconds, until no other rank reads a buffer that was given back.
        sizes: in bytes, of the buffers that will be asked for.
    """

    def __init__(
        self, device: torch.device, wait_for_readers: Callable[[float], None] | None = None, sizes: Iterable[int] = ()
    ) -> None:
        self.device = device
        self._sizes = sorted(sizes)
        self._wait_for_readers = wait_for_readers
        self._keep = device.type == "cpu"
        self._free: list[torch.UntypedStorage] = []
        self._labels: dict[int, Any] = {}

    def borrow(self, numel: int, dtype: torch.dtype, *, lasting: bool = False) -> Tensor:
        """A buffer of ``numel`` elements with arbitrary contents.

        With ``lasting`` it gets a storage of nearly its own size: many such buffers are alive at once, and a larger
        storage would stay partly unused.
        """
        size = numel * dtype.itemsize
        slack = _LASTING_SLACK if lasting else _SLACK
        if size >= _SMALLEST_KEPT:
            memory = self._find(size, slack)
            if memory is not None:
                self._free = [other for other in self._free if other is not memory]
                with torch.inference_mode(False):
                    return torch.empty(0, dtype=dtype, device=self.device).set_(memory, 0, (numel,), (1,))
            if self._keep:
                size = max((other for other in self._sizes if size <= other < slack * size), default=size)
        return empty(-(-size // dtype.itemsize), dtype, self.device)[:numel]

    def _find(self, size: int, slack: float) -> torch.UntypedStorage | None:
        """The smallest free storage of at least ``size`` bytes, and at most ``slack`` times as many, that no tensor
        uses."""
        fits = [memory for memory in self._free if size <= memory.nbytes() < slack * size]
        for turn in range(_TRIES if fits else 0):
            unused = [memory for memory in fits if _is_unused(memory)]
            if unused:
                return min(unused, key=torch.UntypedStorage.nbytes)
            if self._wait_for_readers is not None and not turn:
                self._wait_for_readers(_READERS_SECONDS)
            else:
                time.sleep(1e-4)  # a transport's thread releases its tensors a moment after its work is done
        # A user, or autograd, holds these for longer: do not lend them again.
        self._free = [memory for memory in self._free if not any(memory is other for other in fits)]
        return None

    def give_back(self, buffer: Tensor) -> None:
        """Take a lent buffer back. The caller must not use it any more."""
        memory = buffer.untyped_storage()
        self._labels.pop(memory._cdata, None)
        if self._keep and memory.nbytes() >= _SMALLEST_KEPT:
            self._free.append(memory)

    def label(self, buffer: Tensor, label: object) -> None:
        """Say what a lent buffer holds, until it is given back."""
        self._labels[buffer.untyped_storage()._cdata] = label

    def label_of(self, tensor: Tensor) -> Any:
        """What the lent buffer in which ``tensor`` lies holds; None if it lies in none, or in one without a label."""
        return self._labels.get(tensor.untyped_storage()._cdata) if self._labels else None

    def clear(self) -> None:
        """Drop everything that is free."""
        self._free.clear()


def _is_unused(memory: torch.UntypedStorage) -> bool:
    """Whether no tensor uses ``memory`` any more."""
    return int(torch._C._storage_Use_Count(memory._cdata)) == 1


def owns_its_memory(tensor: Tensor) -> bool:
    """Whether no other tensor lies in the memory of ``tensor``."""
    memory = tensor.untyped_storage()  # counts as one, too
    return int(torch._C._storage_Use_Count(memory._cdata)) == 2


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense ``tensor`` in storage order, as a 1-D view."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def in_storage_order(value: Tensor, entry: Entry) -> Tensor:
    """The elements of ``value``, of the shape of ``entry``'s parameter, in that parameter's storage order (1-D).

    A view if ``value`` has the parameter's strides, else a copy.
    """
    if value.stride() != entry.param.stride:
        stored = torch.empty_strided(value.shape, entry.param.stride, dtype=value.dtype, device=value.device)
        value = stored.copy_(value)
    return flat(value)


def view(buffer: Tensor, entry: Entry) -> Tensor:
    """The range of ``buffer`` (1-D) that belongs to ``entry``, in the parameter's own shape and strides."""
    return buffer.as_strided(entry.param.shape, entry.param.stride, buffer.storage_offset() + entry.offset)
