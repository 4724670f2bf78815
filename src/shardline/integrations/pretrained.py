"""Transformers' pretrained models, sharded over the ranks as they are read: rank 0 reads, all get their part."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardline.comm import Exchange
from shardline.errors import UsageError, text_of
from shardline.features.sharded import make_room, sharded_weights
from shardline.integrations import require
from shardline.runtime.modes import outside_modes
from shardline.runtime.process_group import init_distributed

require("transformers", "shardline.integrations.transformers")

import transformers  # noqa: E402
from safetensors import safe_open  # noqa: E402

__all__ = ["from_pretrained"]

_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def from_pretrained(model_class: Any, path: str | os.PathLike[str], **options: Any) -> Any:
    """``model_class.from_pretrained(path, **options)`` within :func:`shardline.sharded_weights`. Collective.

    Rank 0 reads the safetensors files, a tensor at a time, and every rank keeps its part: the files need not be on the
    other hosts, and no rank holds more than its part and the largest parameter, nor than one conversion takes.
    Renamings, conversions, tied weights and missing weights are those of Transformers. On one rank this is
    ``from_pretrained`` itself.

    Args:
        model_class: a model or an ``AutoModel`` class.
        path: a folder, or the name of a model on the Hub.
        options: of ``from_pretrained``; no ``device_map`` and no quantization.

    Raises:
        UsageError: for an option that places or quantizes weights; where there are no safetensors files.
    """
    init_distributed()
    if dist.get_world_size() == 1:
        return model_class.from_pretrained(path, **options)
    for name in ("device_map", "quantization_config", "state_dict", "tp_plan", "gguf_file"):
        if options.get(name) is not None:
            raise UsageError(f"from_pretrained was given {name}=: the engine places the weights. Leave it out.")
    chosen = {name: options[name] for name in _DOWNLOAD if name in options}
    config = options.pop("config", None) or transformers.AutoConfig.from_pretrained(path, **chosen)
    messages = Exchange.over(dist.group.WORLD)
    try:
        tensors = _tensors(path, chosen, messages)
    finally:
        messages.close()
    with _one_at_a_time(), sharded_weights():
        model = _own_class(model_class, config).from_pretrained(None, config=config, state_dict=tensors, **options)
    if model.can_generate() and os.path.exists(os.path.join(path, "generation_config.json")):
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model


def _own_class(model_class: Any, config: Any) -> Any:
    """The class of the model that ``model_class``, which may be an ``AutoModel``, makes of ``config``."""
    if issubclass(model_class, transformers.PreTrainedModel):
        return model_class
    with torch.device("meta"):
        return type(model_class.from_config(config))


class _Tensor:
    """A tensor of a file of rank 0: read there, and of any values elsewhere. It is used as one of safetensors' slices.

    Args:
        file: that holds it; None on other ranks.
    """

    def __init__(self, name: str, shape: list[int], dtype: torch.dtype, file: Path | None) -> None:
        self.name, self.shape, self.dtype, self.file = name, torch.Size(shape), dtype, file

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return next(name for name, dtype in _DTYPES.items() if dtype is self.dtype)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def numel(self) -> int:
        return self.shape.numel()

    def __getitem__(self, index: Any) -> Tensor:
        make_room(self.shape.numel() * self.dtype.itemsize)
        return self._read()[index]

    @outside_modes
    def _read(self) -> Tensor:
        if self.file is None:
            return torch.empty(self.shape, dtype=self.dtype)
        with safe_open(self.file, framework="pt") as opened:  # closed at once: its map of the file stays else
            value: Tensor = opened.get_tensor(self.name)
        return value


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By the names of safetensors."""


def _tensors(path: str | os.PathLike[str], download: dict[str, Any], messages: Exchange) -> dict[str, _Tensor]:
    """What the files hold, of which rank 0 tells. Collective."""
    found: dict[str, Any] = {}
    if messages.rank == 0:
        try:
            found["tensors"] = list(_listed(path, download))
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {text_of(error)}"
    told = messages.exchange(found)[0]
    if "error" in told:
        raise UsageError(f"from_pretrained cannot read {os.fspath(path)!r}: {told['error']}")
    return {
        name: _Tensor(name, shape, _DTYPES[dtype], Path(file) if messages.rank == 0 else None)
        for name, shape, dtype, file in told["tensors"]
    }


def _listed(path: str | os.PathLike[str], download: dict[str, Any]) -> Iterator[tuple[str, list[int], str, str]]:
    """Name, shape, dtype and file of each tensor."""
    folder = Path(path)
    if not folder.is_dir():
        hub = import_module("huggingface_hub")
        folder = Path(hub.snapshot_download(os.fspath(path), allow_patterns=["*.safetensors", "*.json"], **download))
    index = folder / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    )
    for name in files:
        if not (folder / name).exists():
            raise UsageError(
                f"it holds no {name}. Save the model by save_pretrained() of this version of Transformers."
            )
        with safe_open(folder / name, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                part = opened.get_slice(key)
                yield key, part.get_shape(), part.get_dtype(), os.fspath(folder / name)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Within it Transformers reads no tensor before the last one is in its place."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
