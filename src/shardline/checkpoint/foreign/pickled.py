"""Reads files of ``torch.save`` that hold tensors and plain values, with an unpickler that refuses everything else.

For importing other engines' checkpoints only. A pickle is a program; this one may call a few functions, which make
tensors and ordered dicts, and name classes that become inert :class:`Opaque` values. Any other name is refused before
anything of it is imported.
"""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardline.checkpoint.format.files import open_regular
from shardline.errors import CheckpointError, text_of

__all__ = ["Opaque", "load"]


class Opaque:
    """Stands for an object of a class that is known and not needed; nothing of it is kept."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass


class _Ordered(OrderedDict[Any, Any]):
    """An ordered dict whose pickled attributes (a state_dict's ``_metadata``) are dropped."""

    def __setstate__(self, state: object) -> None:
        pass


_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: object) -> Tensor:
    size, stride = tuple(map(int, size)), tuple(map(int, stride))
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if 0 not in size else -1
    if min((offset, *size, *stride)) < 0 or last >= storage.numel():
        raise CheckpointError("a tensor reaches beyond its storage.")
    return storage.as_strided(size, stride, offset)


def _parameter(data: Tensor, *rest: object) -> Tensor:
    return data


def _with_type(function: Callable[..., Tensor], kind: object, args: tuple[Any, ...], state: object) -> Tensor:
    """A tensor with attributes, which are dropped. ``function`` can only be one of the above."""
    return function(*args)


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _Ordered,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _with_type,
    ("torch.nn.parameter", "Parameter"): Opaque,
    ("torch", "Tensor"): Opaque,
    ("torch", "Size"): tuple,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str, opaque: Collection[str]) -> None:
        self._archive, self._root, self._opaque = archive, root, opaque
        self._storages: dict[str, Tensor] = {}
        super().__init__(archive.open(f"{root}/data.pkl"))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CALLS:
            return _CALLS[module, name]
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if f"{module}.{name}" in self._opaque:
            return Opaque
        raise CheckpointError(
            f"it names {module}.{name}, which is neither a tensor nor a plain value; unpickling it could run code, so "
            f"it is refused."
        )

    def persistent_load(self, identity: Any) -> Tensor:
        kind, dtype, key, _, numel = identity
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not str(key).isalnum():
            raise CheckpointError("it refers to something that is not a tensor's storage.")
        if key not in self._storages:
            data = bytearray(self._archive.read(f"{self._root}/data/{key}"))
            if len(data) < numel * dtype.itemsize:
                raise CheckpointError(f"the storage {key} is truncated.")
            empty = torch.empty(0, dtype=dtype)
            self._storages[key] = torch.frombuffer(data, dtype=dtype, count=numel) if numel else empty
        return self._storages[key]


def load(path: Path, opaque: Collection[str] = ()) -> Any:
    """What ``torch.save`` wrote to ``path``, with CPU tensors. Tensors that shared a storage share one.

    Args:
        opaque: dotted names of classes whose objects may be there and become :class:`Opaque`.

    Raises:
        CheckpointError: for a file that cannot be read, or holds anything else than tensors and plain values.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise CheckpointError("it is compressed, as torch.save never does; a short file could fill memory.")
            found = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(found) != 1:
                raise CheckpointError("it was not written by torch.save.")
            root = found[0].removesuffix("/data.pkl")
            if f"{root}/byteorder" in archive.namelist():
                order = archive.read(f"{root}/byteorder").decode()
                if order != sys.byteorder:
                    raise CheckpointError(f"it was written on a {order}-endian machine.")
            return _Unpickler(archive, root, opaque).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be imported: {text_of(error)}") from None
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, KeyError, ValueError, TypeError, EOFError) as error:
        raise CheckpointError(
            f"{path} cannot be imported: it is damaged, or not written by torch.save ({error})."
        ) from None
