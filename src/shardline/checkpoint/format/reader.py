"""Reads a checkpoint's parameters by name and range, from whatever files hold them. Knows no engine and no ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardline.checkpoint.format.manifest import Manifest, ParameterEntry, key_of, read_manifest
from shardline.checkpoint.format.tensorfile import TensorFile
from shardline.checkpoint.format.values import decode, dtype_named
from shardline.errors import CheckpointError

__all__ = ["CheckpointReader"]


class CheckpointReader:
    """An opened checkpoint. Files are opened when they are first needed.

    Attributes:
        manifest: the parsed ``manifest.json``.
        parameters: its entries by name.
    """

    def __init__(self, path: Path, manifest: Manifest | None = None) -> None:
        self.path = path
        self.manifest = read_manifest(path) if manifest is None else manifest
        self.parameters: dict[str, ParameterEntry] = self.manifest.parameters
        self.aliases = {alias: name for name, entry in self.parameters.items() for alias in (name, *entry.aliases)}
        self._files: dict[int, TensorFile] = {}

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def file(self, number: int) -> TensorFile:
        if number not in self._files:
            self._files[number] = TensorFile(self.path / self.manifest.files[number].name)
        return self._files[number]

    def fill(
        self, out: Tensor, name: str, role: str, start: int, stop: int, stride: Sequence[int] | None = None
    ) -> None:
        """Read elements ``start`` to ``stop`` of a parameter (its name in the checkpoint) into ``out`` (1-D).

        They are counted in the order in which a tensor of strides ``stride`` stores them; ``None``: the writer's.
        Only the parts of files that hold them are read, unless the writer stored the elements in another order: then
        the full parameter is in memory for a moment.
        """
        entry = self.parameters[name]
        if stride is not None and list(stride) != entry.stride and len(entry.shape) > 1:
            theirs = self.full(name, role)
            ours = torch.empty(entry.numel, dtype=theirs.dtype)
            ours.as_strided(entry.shape, stride).copy_(theirs)
            out.copy_(ours[start:stop])
            return
        done = start
        for number, low, high in sorted(entry.stored(role).pieces or (), key=lambda piece: piece[1]):
            first, last = max(done, low), min(stop, high)
            if first < last and low <= done:
                self.file(number).fill(out[first - start : last - start], key_of(role, name), first - low)
                done = last
        if done < stop:
            raise CheckpointError(f"{self.path} holds no elements {done} to {stop} of {role} of {name!r}.")

    def full(self, name: str, role: str = "weight") -> Tensor:
        """All of a parameter or of its state, on CPU, in its own shape and dtype."""
        entry = self.parameters[name]
        stored = entry.stored(role)
        if stored.file is not None:
            return self.file(stored.file).tensor(key_of(role, name))
        out = torch.empty(entry.numel, dtype=dtype_named(stored.dtype))
        self.fill(out, name, role, 0, entry.numel)
        return out.as_strided(entry.shape, entry.stride)

    def buffer(self, name: str, rank: int) -> Tensor:
        """A buffer as ``rank`` had it, on CPU."""
        files = self.manifest.buffers[name].files
        return self.file(rank if rank in files else 0).tensor(key_of("buffer", name))

    def value(self, value: Any) -> Any:
        """A value of the manifest with its tensors, which are in rank 0's file."""
        return decode(value, lambda key: self.file(0).tensor(key))
