"""The whole model in Hugging Face's layout: safetensors files of a limited size, and an index of which holds what.

Tensors are written one after the other to places that are known beforehand, so one of them at a time is in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shardline.checkpoint.engine.view import EngineView
from shardline.checkpoint.format.commit import together
from shardline.checkpoint.format.directory import sync
from shardline.checkpoint.format.reader import CheckpointReader
from shardline.checkpoint.format.tensorfile import header_of, memory_of
from shardline.checkpoint.format.values import dtype_named
from shardline.plan.describe import persistent_buffers
from shardline.sharding.fragments import full_weights

__all__ = ["Exporter", "Item", "export_checkpoint", "export_model"]

SHARD_BYTES = 5_000_000_000
NAME = "model"
TEMP = ".shardline-export-"


@dataclass(frozen=True)
class Item:
    """A tensor to come: its dtype and shape in the export."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        total = self.dtype.itemsize
        for size in self.shape:
            total *= size
        return total


@dataclass
class _File:
    names: dict[str, Item] = field(default_factory=dict)
    bytes: int = 0
    descriptor: int = -1
    starts: dict[str, int] = field(default_factory=dict)


class Exporter:
    """Writes the tensors ``items``, which may come in any order, to ``path``.

    Tied tensors are written once, under their first name; ``aliases`` (other name to first name) goes into the header,
    where ``safetensors.torch.load_model`` looks for it. Nothing has its final name before :meth:`finish`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        items: Mapping[str, Item],
        aliases: Mapping[str, str],
        *,
        stem: str = NAME,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.path, self._stem = Path(path), stem
        self.path.mkdir(parents=True, exist_ok=True)
        self._files = [_File()]
        for name, item in items.items():
            if self._files[-1].names and self._files[-1].bytes + item.bytes > shard_bytes:
                self._files.append(_File())
            self._files[-1].names[name] = item
            self._files[-1].bytes += item.bytes
        self._of = {name: file for file in self._files for name in file.names}
        self._aliases = dict(aliases)
        for number, file in enumerate(self._files):
            mine = {alias: name for alias, name in aliases.items() if name in file.names}
            head = header_of(
                {name: (item.dtype, item.shape) for name, item in file.names.items()}, {"format": "pt", **mine}
            )
            file.descriptor = _create(self._temporary(number))
            _write(file.descriptor, memoryview(head), 0)
            position = len(head)
            for name, item in file.names.items():
                file.starts[name] = position
                position += item.bytes
            os.ftruncate(file.descriptor, position)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor (its own shape; any device, dtype and strides)."""
        file = self._of[name]
        host = tensor.detach().to("cpu", file.names[name].dtype).contiguous()
        _write(file.descriptor, memory_of(host), file.starts[name])

    def finish(self) -> list[Path]:
        """Bring everything to the disk and to its names; returns the files."""
        count = len(self._files)
        written = []
        for number, file in enumerate(self._files):
            os.fsync(file.descriptor)
            os.close(file.descriptor)
            file.descriptor = -1
            final = self.path / (
                f"{self._stem}.safetensors"
                if count == 1
                else f"{self._stem}-{number + 1:05d}-of-{count:05d}.safetensors"
            )
            os.replace(self._temporary(number), final)
            written.append(final)
        index = self.path / f"{self._stem}.safetensors.index.json"
        weight_map = {name: file.name for each, file in zip(self._files, written, strict=True) for name in each.names}
        total = sum(each.bytes for each in self._files)
        temporary = index.with_name(f"{TEMP}{index.name}")
        with os.fdopen(_create(temporary), "w", encoding="utf-8") as opened:
            opened.write(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")
        os.replace(temporary, index)
        sync(self.path)
        return [*written, index]

    def abandon(self) -> None:
        """Remove what was not finished."""
        for number, file in enumerate(self._files):
            if file.descriptor >= 0:
                os.close(file.descriptor)
                file.descriptor = -1
                self._temporary(number).unlink(missing_ok=True)

    def _temporary(self, number: int) -> Path:
        return self.path / f"{TEMP}{self._stem}-{number + 1:05d}"


def _create(path: Path) -> int:
    """A file of a name of our own; what a killed export left there is written over, but nothing through a link."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def _write(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, position)
        data, position = data[count:], position + count


def exported_dtype(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """``wanted`` for floating tensors, where it is given."""
    return wanted if wanted is not None and dtype.is_floating_point else dtype


def export_checkpoint(
    reader: CheckpointReader,
    out: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write the model of a checkpoint: no process group, no model, one tensor at a time. Returns the files.

    ``dtype`` is for floating weights; ``None`` leaves that of the masters.
    """
    items: dict[str, Item] = {}
    aliases: dict[str, str] = {}
    for name, entry in reader.parameters.items():
        if entry.weight is not None:
            items[name] = Item(exported_dtype(dtype_named(entry.weight.dtype), dtype), tuple(entry.shape))
            aliases.update(dict.fromkeys(entry.aliases, name))
    for name, buffer in reader.manifest.buffers.items():
        items[name] = Item(dtype_named(buffer.dtype), tuple(buffer.shape))
    exporter = Exporter(out, items, aliases, shard_bytes=shard_bytes)
    try:
        for name in items:
            exporter.add(name, reader.buffer(name, 0) if name in reader.manifest.buffers else reader.full(name))
        return exporter.finish()
    finally:
        exporter.abandon()


def export_model(
    engine: EngineView,
    out: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    frozen: bool = True,
    stem: str = NAME,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write the model of an engine, unit by unit. Collective; rank 0 writes.

    Raises:
        CheckpointError: on every rank, if rank 0 could not write.
    """
    comm = engine.comm
    exporter: Exporter | None = None
    failure: Exception | None = None
    buffers = dict(persistent_buffers(engine.module))

    def attempt(action: Callable[[], object]) -> None:
        # Rank 0 goes on taking part in the gathers after a failure: the others wait for it.
        nonlocal failure
        if comm.data.rank == 0 and failure is None:
            try:
                action()
            except Exception as error:
                failure = error

    def begin() -> None:
        nonlocal exporter
        items: dict[str, Item] = {}
        aliases: dict[str, str] = {}
        for unit in engine.units:
            for bucket in unit.buckets:
                stored = bucket.plan.dtype if bucket.weights.master is None else bucket.weights.master.dtype
                for entry in bucket.plan.entries if bucket.plan.trainable or frozen else ():
                    items[entry.param.name] = Item(exported_dtype(stored, dtype), entry.param.shape)
                    first, *others = entry.param.aliases
                    aliases.update(dict.fromkeys(others, first))
        items.update({name: Item(buffer.dtype, tuple(buffer.shape)) for name, buffer in buffers.items()})
        exporter = Exporter(out, items, aliases, stem=stem, shard_bytes=shard_bytes)

    def add(name: str, tensor: Tensor) -> None:
        if exporter is not None:
            exporter.add(name, tensor)

    attempt(begin)
    for unit in engine.units:
        for entry, tensor in full_weights(unit):
            if entry.param.trainable or frozen:
                attempt(partial(add, entry.param.name, tensor))
    for name, buffer in buffers.items():
        attempt(partial(add, name, buffer))

    def finish() -> list[str]:
        if failure is not None:
            raise failure
        return [] if exporter is None else [str(path) for path in exporter.finish()]

    try:
        return [Path(path) for path in together(comm.messages, f"exporting to {out}", finish)[0]]
    finally:
        if exporter is not None:
            exporter.abandon()
