"""A checkpoint as Python sees it: whole tensors by name, each read when it is asked for. Knows no engine, no ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from shardline.checkpoint.format.directory import Directory, check_files
from shardline.checkpoint.format.reader import CheckpointReader
from shardline.checkpoint.format.tensorfile import TensorFile
from shardline.errors import CheckpointError, shown

__all__ = ["Snapshot", "read"]

logger = logging.getLogger("shardline")


def read(directory: str | os.PathLike[str], tag: str | None = None, *, verify: bool = True) -> Snapshot:
    """Open a checkpoint that any stage and number of ranks has saved. No engine and no process group are needed.

    Args:
        directory: what was given to ``save_checkpoint``, or one checkpoint in it.
        tag: which one; the newest intact one if left out, and a warning says why not a later one.
        verify: compare the checksum of each file when it is first needed, which reads it whole.

    Returns:
        The checkpoint. Nothing but its manifest was read yet.

    Raises:
        CheckpointError: if there is no such checkpoint, or none is intact.
        UsageError: if ``tag`` cannot be a checkpoint's name.
    """
    _, path, passed_over = Directory(directory).choose(tag)
    for reason in passed_over:
        logger.warning("%s is read, and not a later checkpoint: %s", path, reason)
    return Snapshot(path, verify=verify)


class Snapshot(Mapping[str, Tensor]):
    """The weights and persistent buffers of a checkpoint, by the names of the model's ``state_dict()``.

    A mapping: ``snapshot["head.weight"]`` reads that tensor alone, whole, on CPU, in the dtype of the masters.
    Buffers are rank 0's. Made by :func:`shardline.checkpoint.read`; close it, or use it in a ``with`` statement.

    Attributes:
        path: the checkpoint's own folder.
    """

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        self.path = path
        self._reader = _CheckedReader(path) if verify else CheckpointReader(path)
        saved = self._reader.parameters
        self._params = {alias: name for alias, name in self._reader.aliases.items() if saved[name].weight is not None}

    # -- weights and buffers ----------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        """One whole tensor, read now.

        Raises:
            KeyError: if there is none of that name.
            CheckpointError: if the file that holds it is damaged.
        """
        if name in self._params:
            return self._reader.full(self._params[name])
        if name not in self._reader.manifest.buffers:
            raise KeyError(name)
        return self._reader.buffer(name, 0)

    def __iter__(self) -> Iterator[str]:
        yield from self._params
        yield from self._reader.manifest.buffers

    def __len__(self) -> int:
        return len(self._params) + len(self._reader.manifest.buffers)

    def __contains__(self, name: object) -> bool:
        return name in self._params or name in self._reader.manifest.buffers

    def shape(self, name: str) -> torch.Size:
        """The shape of a weight or buffer, without reading it. Raises KeyError as a read does."""
        found = self._params.get(name)
        manifest = self._reader.manifest
        return torch.Size((manifest.buffers[name] if found is None else manifest.parameters[found]).shape)

    def state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """All of it, for ``model.load_state_dict``: weights, buffers and what modules return as extra state.

        Args:
            dtype: of floating weights; ``None`` leaves that of the masters, fp32 where there are any.
        """
        whole: dict[str, Tensor] = {}
        found: dict[str, Any] = {}
        for alias, name in self._params.items():
            if name not in whole:
                value = self._reader.full(name)
                whole[name] = value if dtype is None or not value.is_floating_point() else value.to(dtype)
            found[alias] = whole[name]  # tied names share one tensor, as in a model
        found.update({name: self[name] for name in self._reader.manifest.buffers})
        for module, value in self._reader.manifest.extra_state.items():
            prefix = f"{module}." if module else ""
            found[f"{prefix}_extra_state"] = self._reader.value(value)
        return found

    # -- what else was saved ----------------------------------------------------------------------------------------

    def optimizer_state(self, name: str) -> dict[str, Any]:
        """The optimizer's state of one parameter: whole tensors by the optimizer's own keys, and scalars; read now.

        Raises:
            KeyError: if there is no parameter of that name.
            CheckpointError: if the file that holds it is damaged.
        """
        first = self._reader.aliases[name]
        entry = self._reader.parameters[first]
        scalars = {key: self._reader.value(value) for key, value in entry.scalars.items()}
        return scalars | {key: self._reader.full(first, f"state.{key}") for key in entry.state}

    @cached_property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's param groups: their options, and under ``"params"`` the names of their parameters."""
        optimizer = self._reader.manifest.optimizer
        groups = [] if optimizer is None else [dict(group) for group in optimizer.groups]
        return [
            {
                **{key: self._reader.value(value) for key, value in group.items()},
                "params": [name for name, entry in self._reader.parameters.items() if entry.group == index],
            }
            for index, group in enumerate(groups)
        ]

    @property
    def tag(self) -> str:
        return self._reader.manifest.tag

    @property
    def global_steps(self) -> int:
        """Optimizer steps that the run had made."""
        return self._reader.manifest.counters.global_steps

    @cached_property
    def client_state(self) -> dict[str, Any]:
        """The user's own values."""
        values: dict[str, Any] = self._reader.value(self._reader.manifest.client_state)
        return values

    # -- open and closed --------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the files. A read afterwards opens them again."""
        self._reader.close()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Snapshot of {shown(self.path)}: {len(self)} tensors at step {self.global_steps}"


class _CheckedReader(CheckpointReader):
    """Compares the checksum of each file before it reads of it."""

    def file(self, number: int) -> TensorFile:
        if number not in self._files and (problems := check_files(self.path, self.manifest, [number])):
            raise CheckpointError(f"{'; '.join(problems)}.")
        return super().file(number)
