"""``torch.distributed.checkpoint`` reads and writes Shardline's checkpoints: a storage reader and a storage writer.

    state = interchange.state_of(model, optimizer)
    torch.distributed.checkpoint.load(state, storage_reader=interchange.Reader(path))
    torch.distributed.checkpoint.save(state, storage_writer=interchange.Writer(path, step=100, optimizer="AdamW"))

Keys are those of the format (``docs/checkpoints.md``): ``weight/<parameter>``, ``state.<key>/<parameter>``,
``buffer/<buffer>``. Tensors have the parameter's shape, whole or sharded as DTensor; each rank reads and writes by
itself. Only tensors travel: what ``torch.distributed.checkpoint`` would pickle is refused.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future
from torch.optim import Optimizer

from shardline.checkpoint.format.commit import SingleProcess, commit, together
from shardline.checkpoint.format.content import (
    Body,
    Captured,
    Content,
    add_reports,
    buffer_entry,
    parameter_entry,
)
from shardline.checkpoint.format.directory import Directory, check_files
from shardline.checkpoint.format.manifest import key_of
from shardline.checkpoint.format.reader import CheckpointReader
from shardline.checkpoint.format.values import dtype_named, name_of
from shardline.comm import Exchange
from shardline.errors import CheckpointError, UsageError, text_of
from shardline.plan.describe import persistent_buffers
from shardline.runtime.modes import outside_modes

__all__ = ["Reader", "Writer", "state_of"]

logger = logging.getLogger("shardline")


def state_of(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Tensor]:
    """The tensors of a model and of its optimizer (once it has stepped) under the keys of the format; no copies."""
    found: dict[str, Tensor] = {key_of("weight", name): param for name, param in model.named_parameters()}
    found |= {key_of("buffer", name): buffer for name, buffer in persistent_buffers(model)}
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    for param, state in optimizer.state.items() if optimizer is not None else ():
        for key, value in state.items():
            if isinstance(value, Tensor):
                found[key_of(f"state.{key}", names[param])] = value
    return found


class Reader(StorageReader):
    """Reads the checkpoint at ``path`` for ``torch.distributed.checkpoint.load``; its files are verified first.

    Args:
        path: one checkpoint, or a directory of them: then the newest intact one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.reset(path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is None:
            return
        directory = Directory(checkpoint_id)
        if directory.is_checkpoint():
            self._opened = _verified(directory.path)
            return
        passed_over = []
        for tag in directory.order():
            try:
                path = directory.locate(tag)
                if path is None:
                    raise CheckpointError(f"there is no {directory.path / tag}")
                self._opened = _verified(path)
            except CheckpointError as error:
                passed_over.append(text_of(error).removesuffix("."))
                continue
            for reason in passed_over:
                logger.warning("%s is read and not a later checkpoint: %s", path, reason)
            return
        raise CheckpointError(f"there is no intact checkpoint: {'; '.join(passed_over) or directory.lack()}.")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        entries: dict[str, Any] = {}
        for name, entry in self._opened.parameters.items():
            for alias in (name, *entry.aliases):
                if entry.weight is not None:
                    entries[f"weight/{alias}"] = _whole(entry.shape, entry.weight.dtype)
                for key, stored in entry.state.items():
                    shape = entry.shape if stored.shape is None else stored.shape
                    entries[f"state.{key}/{alias}"] = _whole(shape, stored.dtype)
                for key, value in entry.scalars.items():
                    if isinstance(value, dict) and "$scalar" in value:
                        entries[f"state.{key}/{alias}"] = _whole([], value["dtype"])
        for name, buffer in self._opened.manifest.buffers.items():
            entries[f"buffer/{name}"] = _whole(buffer.shape, buffer.dtype)
        return Metadata(state_dict_metadata=entries, storage_meta=StorageMeta(checkpoint_id=str(self._opened.path)))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @outside_modes
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        try:
            for item in plan.items:
                whole = self._read(*item.storage_index.fqn.split("/", 1))
                for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    whole = whole.narrow(dimension, start, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(whole)
                planner.commit_tensor(item, target)
        finally:
            self._opened.close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, role: str, name: str) -> Tensor:
        if role == "buffer":
            return self._opened.buffer(name, 0)
        name, key = self._opened.aliases[name], role.removeprefix("state.")
        scalars = self._opened.parameters[name].scalars
        if key != role and key in scalars:
            return torch.as_tensor(self._opened.value(scalars[key]))
        return self._opened.full(name, role)


def _verified(path: Path) -> CheckpointReader:
    opened = CheckpointReader(path)
    problems = check_files(path, opened.manifest, range(len(opened.manifest.files)))
    if problems:
        raise CheckpointError(f"{path} is damaged: {'; '.join(problems)}.")
    return opened


def _whole(shape: list[int], dtype: str) -> TensorStorageMetadata:
    size = torch.Size(shape)
    chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=size)
    return TensorStorageMetadata(TensorProperties(dtype=dtype_named(dtype)), size, [chunk])


class Writer(StorageWriter):
    """Writes a checkpoint that ``load_checkpoint`` takes, for torch's ``save`` (not for its ``async_save``).

    It is committed as every save is, so a reader never sees a part of it. It holds no position in the data, no
    schedule, no random states and no options of param groups: those of the job that loads it stay.

    Args:
        path: the directory of checkpoints; ``checkpoint_id`` of ``save`` if left out.
        step: optimizer steps that were done.
        optimizer: class of the optimizer whose state is among the tensors (``"AdamW"``): it is loaded by the same kind.
        tag: the checkpoint's name, ``global_step<step>`` if left out.
        group: the process group that was given to ``save``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        step: int = 0,
        optimizer: str | None = None,
        tag: str | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self._path = path
        self._step, self._optimizer, self._group = step, optimizer, group
        self._tag = f"global_step{step}" if tag is None else tag

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._path = self._path if checkpoint_id is None else checkpoint_id

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if self._path is None:
            raise UsageError("say where to write: Writer(path), or checkpoint_id=path of torch's save.")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        for item in plan.items:
            _range(item)  # refuses what cannot be written, before anything is
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The first rank writes the buffers, as always; all learn which state is not shaped as its weight."""
        shapes = {item.index.fqn: _shape(item) for plan in plans for item in plan.items}
        apart = []
        for key, shape in shapes.items():
            role, _, name = key.partition("/")
            if f"weight/{name}" not in shapes and role != "buffer":
                raise CheckpointError(f"there is {key!r}, and no 'weight/{name}' that it belongs to.")
            if role not in ("weight", "buffer") and shape not in ([], shapes[f"weight/{name}"]):
                apart.append(key)
        items = [[item for item in plan.items if not item.index.fqn.startswith("buffer/")] for plan in plans]
        items[0] += [item for plan in plans for item in plan.items if item.index.fqn.startswith("buffer/")]
        told = {"ranks": len(plans), "apart": apart}
        return [replace(plan, items=mine, storage_data=told) for mine, plan in zip(items, plans, strict=True)]

    @outside_modes
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """All of the save: every rank is here, and the commit has its own order among them."""
        group = dist.group.WORLD if self._group is None else self._group
        alone = plan.storage_data["ranks"] == 1
        channel = SingleProcess() if alone else Exchange.over(group)
        found = Captured()
        try:
            together(channel, "collecting the checkpoint", lambda: _collect(plan, planner, found))
            content = Content(found.tensors, _report(plan, found), self._body)
            commit(str(self._path), self._tag, content, channel, lambda point: None)
        finally:
            channel.close()
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing is left to do."""

    def _body(self, reports: list[dict[str, Any]]) -> Body:
        shapes: dict[str, list[int]] = {key: shape for report in reports for key, shape in report["shapes"].items()}
        weights = {key.removeprefix("weight/"): shape for key, shape in shapes.items() if key.startswith("weight/")}
        parameters = add_reports({name: parameter_entry(shape) for name, shape in weights.items()}, reports)
        for name, entry in parameters.items():
            entry["dtype"] = entry["weight"]["dtype"]
            for stored in (entry["weight"], *entry["state"].values()):
                _check_cover(name, math.prod(entry["shape"]), stored.get("pieces"))
        return Body(
            world_size=len(reports),
            counters={
                "global_steps": self._step,
                "micro_steps": self._step,
                "global_samples": 0,
                "skipped_steps": 0,
            },
            optimizer=None if self._optimizer is None else {"class": self._optimizer, "groups": []},
            parameters=parameters,
            buffers={
                key.removeprefix("buffer/"): buffer_entry(shape, reports[0]["buffers"][key])
                for key, shape in shapes.items()
                if key.startswith("buffer/")
            },
        )


def _collect(plan: SavePlan, planner: SavePlanner, found: Captured) -> None:
    """Add this rank's tensors to ``found``."""
    for item in plan.items:
        key, (start, stop) = item.index.fqn, _range(item)
        role, _, name = key.partition("/")
        tensor = planner.resolve_data(item)
        if not isinstance(tensor, Tensor):
            raise AssertionError(f"torch's planner gave a {type(tensor).__name__} for {key!r}")
        tensor = tensor.detach()
        if key in found.tensors:
            raise CheckpointError(f"{key!r} lies on one rank in several pieces; shard it so that each has one.")
        if role == "buffer":
            found.tensors[key] = tensor
        elif role != "weight" and (not _shape(item) or key in plan.storage_data["apart"]):
            found.add_uncut(name, {role.removeprefix("state."): tensor})
        elif start < stop or not math.prod(_shape(item)):
            found.add_piece(role, name, start, stop, tensor.reshape(-1))


def _report(plan: SavePlan, found: Captured) -> dict[str, Any]:
    shapes = {item.index.fqn: _shape(item) for item in plan.items}
    buffers = {key: name_of(found.tensors[key].dtype) for key in shapes if key.startswith("buffer/")}
    return found.report() | {"shapes": shapes, "buffers": buffers}


def _shape(item: WriteItem) -> list[int]:
    if item.tensor_data is None:
        raise CheckpointError(
            f"{item.index.fqn!r} is not a tensor, and torch would pickle it. Save tensors only, as "
            f"state_of(model, optimizer) collects them."
        )
    return list(item.tensor_data.size)


def _range(item: WriteItem) -> tuple[int, int]:
    """The elements of a chunk, counted as a contiguous tensor stores them.

    Raises:
        CheckpointError: for what has no place in the format.
    """
    key, shape = item.index.fqn, _shape(item)
    role, _, name = key.partition("/")
    if not name or role.partition(".")[0] not in ("weight", "state", "buffer"):
        raise CheckpointError(
            f"{key!r} is not a key of a checkpoint. Keys are weight/<parameter>, state.<key>/<parameter> and "
            f"buffer/<buffer>, as state_of(model, optimizer) makes them."
        )
    chunk = item.tensor_data.chunk  # type: ignore[union-attr]
    first = next((d for d, length in enumerate(chunk.sizes) if length != 1), len(shape))
    if math.prod(chunk.sizes) and any(chunk.sizes[d] != shape[d] for d in range(first + 1, len(shape))):
        raise CheckpointError(
            f"{key!r} is sharded in another dimension than its first, so a shard is not a range of elements. Shard "
            f"it by rows (Shard(0)), or save it whole."
        )
    if role == "buffer" and list(chunk.sizes) != shape:
        raise CheckpointError(f"{key!r} is sharded; buffers are saved whole.")
    start = sum(offset * math.prod(shape[d + 1 :]) for d, offset in enumerate(chunk.offsets))
    return start, start + math.prod(chunk.sizes)


def _check_cover(name: str, numel: int, pieces: list[list[int]] | None) -> None:
    done = 0
    for _, start, stop in sorted(pieces or (), key=lambda piece: piece[1]):
        if start != done:
            raise CheckpointError(f"the ranks gave elements of {name!r} twice, or not all of them: {pieces}.")
        done = stop
    if pieces is not None and done != numel:
        raise CheckpointError(f"the ranks gave {done} of the {numel} elements of {name!r}.")
