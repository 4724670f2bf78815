"""What modules keep other than parameters and buffers: ``get_extra_state`` and ``set_extra_state`` of ``nn.Module``.

It is a value of the format, never a pickle. Rank 0's is kept, as with ``client_state``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shardline.checkpoint.format.values import decode, dtype_named, encode, name_of
from shardline.comm import Comm
from shardline.errors import CheckpointError, text_of
from shardline.names import join

__all__ = ["EXTRA_KEY", "capture_extra", "load_extra", "shared_extra", "takers"]

EXTRA_KEY = "_extra_state"
"""torch's name of it in a ``state_dict``, behind the module's."""


def _overrides(module: nn.Module, method: str) -> bool:
    return getattr(type(module), method) is not getattr(nn.Module, method)


def takers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that can be given extra state, by name."""
    return {path: module for path, module in model.named_modules() if _overrides(module, "set_extra_state")}


def _givers(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if _overrides(module, "get_extra_state")}


def capture_extra(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The extra state of ``model`` by module; its tensors are added to ``tensors``.

    Raises:
        CheckpointError: for what no checkpoint holds; names the module.
    """
    return {path: _encode(path, module.get_extra_state(), tensors) for path, module in _givers(model).items()}


def _encode(path: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    try:
        return encode(value, f"extra_state[{path!r}]", tensors)
    except CheckpointError as error:
        raise CheckpointError(f"get_extra_state() of module {path!r} cannot be saved: {text_of(error)}") from None


def load_extra(model: nn.Module, values: Mapping[str, Any]) -> None:
    """Give modules their extra state: decoded values by module.

    Raises:
        CheckpointError: if a module does not take it.
    """
    for path, module in takers(model).items():
        if path in values:
            try:
                module.set_extra_state(values[path])
            except Exception as error:
                raise CheckpointError(
                    f"set_extra_state() of module {path!r} raised {type(error).__name__}: {text_of(error)}"
                ) from error


def shared_extra(model: nn.Module, comm: Comm) -> dict[str, Any]:
    """Rank 0's extra state on every rank, tensors on CPU, under the names of a ``state_dict``. Collective.

    What is not a value of the format stays on its rank: every rank gets its own then.
    """
    own = {path: module.get_extra_state() for path, module in _givers(model).items()}
    tensors: dict[str, Tensor] = {}
    encoded: dict[str, Any] = {}
    for path, value in own.items() if comm.data.rank == 0 else ():
        kept = dict(tensors)
        try:
            encoded[path] = encode(value, f"{path}.", kept)
            tensors = kept
        except CheckpointError:
            continue
    if own:
        shapes = [[key, name_of(tensor.dtype), list(tensor.shape)] for key, tensor in tensors.items()]
        encoded, shapes = comm.messages.exchange([encoded, shapes])[0]
        for key, dtype, shape in shapes:
            whole = tensors[key] if key in tensors else torch.empty(shape, dtype=dtype_named(dtype))
            copy = whole.to(comm.device, copy=True).contiguous()
            comm.messages.broadcast([copy])
            tensors[key] = copy.cpu()
    values = {path: decode(encoded[path], tensors.__getitem__) if path in encoded else own[path] for path in own}
    return {
        join(path, EXTRA_KEY): values[first]
        for first, giver in _givers(model).items()
        for path, module in model.named_modules(remove_duplicate=False)
        if module is giver
    }
