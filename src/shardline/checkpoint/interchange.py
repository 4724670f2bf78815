"""``torch.distributed.checkpoint`` reads Shardline's checkpoints: a storage reader for its ``load``.

    state = {"weight/" + name: tensor for name, tensor in model.state_dict().items()}
    torch.distributed.checkpoint.load(state, storage_reader=Reader(path), no_dist=True)

Keys are those of the format (``docs/checkpoints.md``): ``weight/<parameter>``, ``state.<key>/<parameter>``,
``buffer/<buffer>``. Tensors have the parameter's shape, whole or sharded as DTensor; each rank reads by itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from shardline.checkpoint.directory import Directory, check_files
from shardline.checkpoint.reader import Reader as Opened
from shardline.checkpoint.values import dtype_named
from shardline.errors import CheckpointError

__all__ = ["Reader"]


class Reader(StorageReader):
    """Reads the checkpoint at ``path`` for ``torch.distributed.checkpoint.load``; its files are verified first.

    Args:
        path: one checkpoint, or a directory of them: then the newest.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.reset(path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is None:
            return
        path = Path(checkpoint_id)
        order = Directory(path).order()
        chosen = Directory(path).locate(order[0]) if order else path
        self._opened = Opened(chosen or path)
        problems = check_files(self._opened.path, self._opened.manifest, range(len(self._opened.manifest["files"])))
        if problems:
            raise CheckpointError(f"{self._opened.path} is damaged: {'; '.join(problems)}.")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        rows: dict[str, Any] = {}
        for name, row in self._opened.parameters.items():
            for alias in (name, *row["aliases"]):
                if row["weight"] is not None:
                    rows[f"weight/{alias}"] = _whole(row["shape"], row["weight"]["dtype"])
                for key, record in row["state"].items():
                    rows[f"state.{key}/{alias}"] = _whole(record.get("shape", row["shape"]), record["dtype"])
        for name, row in self._opened.manifest["buffers"].items():
            rows[f"buffer/{name}"] = _whole(row["shape"], row["dtype"])
        return Metadata(state_dict_metadata=rows, storage_meta=StorageMeta(checkpoint_id=str(self._opened.path)))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            role, _, name = item.storage_index.fqn.partition("/")
            if role == "buffer":
                whole = self._opened.buffer(name, 0)
            else:
                whole = self._opened.whole(self._opened.aliases[name], role)
            for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                whole = whole.narrow(dimension, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(whole)
            planner.commit_tensor(item, target)
        self._opened.close()
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _whole(shape: list[int], dtype: str) -> TensorStorageMetadata:
    size = torch.Size(shape)
    chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=size)
    return TensorStorageMetadata(TensorProperties(dtype=dtype_named(dtype)), size, [chunk])
