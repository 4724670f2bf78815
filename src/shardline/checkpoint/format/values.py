"""Plain values as JSON text and back, exactly: what JSON lacks is tagged, tensors go to a tensor file, nothing else.

{"$tuple": [...]}    {"$dict": [[key, value], ...]}    {"$counter": [[key, count], ...]}    {"$float": "inf"}
{"$scalar": number, "dtype": "float32"}    a tensor without dimensions
{"$tensor": key}                           a tensor, under ``key`` in the file
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from shardline.errors import CheckpointError, shown

__all__ = ["decode", "dtype_named", "encode", "name_of"]


def name_of(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"the checkpoint holds a tensor of dtype {name!r}, which this torch does not know.")
    return dtype


def encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as something that JSON can hold; its tensors are added to ``tensors`` under keys that begin ``where``.

    Raises:
        CheckpointError: for anything but None, booleans, numbers, strings, tensors, and lists, tuples and dicts of
            them; says where it is and how to save it.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Tensor):
        return _encode_tensor(value, where, tensors)
    if type(value) is list:
        return [encode(item, f"{where}[{i}]", tensors) for i, item in enumerate(value)]
    if type(value) is tuple:
        return {"$tuple": [encode(item, f"{where}[{i}]", tensors) for i, item in enumerate(value)]}
    if isinstance(value, Mapping):
        return _encode_mapping(value, where, tensors)
    raise CheckpointError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, and a checkpoint holds plain values only, "
        f"so that loading one runs no code: None, booleans, numbers, strings, tensors, and lists, tuples and dicts of "
        f"them. {_remedy(value)}"
    )


def _encode_mapping(value: Mapping[Any, Any], where: str, tensors: dict[str, Tensor]) -> Any:
    pairs = [[key, encode(item, f"{where}[{key!r}]", tensors)] for key, item in value.items()]
    if type(value) is Counter:
        return {"$counter": [[encode(key, f"a key of {where}", tensors), item] for key, item in pairs]}
    if all(type(key) is str and not key.startswith("$") for key, _ in pairs):
        return dict(pairs)
    return {"$dict": [[encode(key, f"a key of {where}", tensors), item] for key, item in pairs]}


def _encode_tensor(value: Tensor, where: str, tensors: dict[str, Tensor]) -> Any:
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        raise CheckpointError(f"{where} is a tensor of layout {value.layout} on {value.device}; save a dense one.")
    if value.dim() == 0 and not value.is_complex():
        return {"$scalar": encode(value.item(), where, tensors), "dtype": name_of(value.dtype)}
    tensors[where] = value.detach()
    return {"$tensor": where}


def _remedy(value: Any) -> str:
    kind = type(value)
    if kind.__module__ == "numpy":
        return "Use torch.from_numpy(array) for an array, .item() for a number."
    if hasattr(value, "state_dict"):
        return "Put its state_dict() there and give it back with load_state_dict()."
    if isinstance(value, set | frozenset):
        return "Use a sorted list."
    if isinstance(value, bytes | bytearray):
        return "Use a string, or torch.frombuffer(bytearray(data), dtype=torch.uint8)."
    return "Write down the values that it is made of, and make it from them again after loading."


def decode(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The inverse of :func:`encode`; ``tensor`` reads one by its key.

    Raises:
        CheckpointError: for what :func:`encode` does not make.
    """
    try:
        return _decode(value, tensor)
    except (ValueError, TypeError, OverflowError, RuntimeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the checkpoint holds a value that no save writes ({shown(error)}).") from None


def _decode(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$float": text}:
            return float(text)
        case {"$tuple": items}:
            return tuple(_decode(item, tensor) for item in items)
        case {"$dict": pairs}:
            return {_decode(key, tensor): _decode(item, tensor) for key, item in pairs}
        case {"$counter": pairs}:
            return Counter({_decode(key, tensor): _decode(item, tensor) for key, item in pairs})
        case {"$scalar": number, "dtype": dtype}:
            return torch.tensor(_decode(number, tensor), dtype=dtype_named(dtype))
        case {"$tensor": key}:
            return tensor(key)
    return {key: _decode(item, tensor) for key, item in value.items()}
