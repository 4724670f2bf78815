"""Checks that an engine can manage a model, before anything is changed; and that the model stays so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from shardline.errors import ModelError
from shardline.names import join, listed
from shardline.plan.describe import first_names
from shardline.sharding.parameter import is_sealed, record_of
from shardline.sharding.sharded_param import sharded_param_of

__all__ = ["HeldParameters", "check_model"]

_WRAPPERS = {
    ("torch", "DistributedDataParallel"): "averages gradients as well. Pass what it wraps: .module",
    ("torch", "DataParallel"): "copies the model in each forward. Pass what it wraps: .module",
    ("torch", "FullyShardedDataParallel"): "shards parameters as well. Leave it out",
    ("torch", "FSDPModule"): "shards parameters as well. Leave the call of fully_shard out",
    ("deepspeed", "DeepSpeedEngine"): "is another engine. Pass what it wraps: .module",
}
"""Classes that do an engine's work themselves, by package and name, so that none is imported for the check."""


def check_model(model: nn.Module) -> None:
    """Check that nothing else manages ``model``, and that each of its tensors has memory of its own.

    Raises:
        ModelError: naming the module or tensor.
    """
    for path, module in model.named_modules():
        for kind in type(module).__mro__:
            reason = _WRAPPERS.get((kind.__module__.split(".")[0], kind.__name__))
            if reason is not None:
                where = f"module {path!r}" if path else "the model"
                raise ModelError(f"{where} is wrapped by {kind.__name__}, which {reason}; the engine takes its place.")
    for name, param in model.named_parameters():
        if record_of(param) is not None and sharded_param_of(param) is None:
            raise ModelError(
                f"parameter {name!r} is managed by an engine already. Go on with that engine, or call its destroy() "
                f"before the next initialize. What two models share is trained by one engine over both of them."
            )
        if is_traceable_wrapper_subclass(param):
            what = type(param).__name__
            advice = "Leave out what distributes it" if what == "DTensor" else "Make it a plain tensor"
            raise ModelError(
                f"parameter {name!r} is a {what}, which has no memory of its own to shard. {advice}, and give "
                f"initialize the plain model."
            )
    _check_memory(model)


@dataclass(frozen=True)
class _Held:
    """A tensor that a model holds, and the memory in which it lies."""

    what: str  # "parameter", "buffer" or "attribute"
    name: str
    tensor: Tensor
    memory: tuple[str, int]  # one space of addresses
    start: int  # first byte
    stop: int

    @classmethod
    def of(cls, what: str, name: str, tensor: Tensor) -> _Held:
        if tensor.is_meta:
            memory, start = tensor.untyped_storage()._cdata, int(tensor.storage_offset()) * tensor.element_size()
        else:
            memory, start = 0, tensor.data_ptr()
        extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        stop = start + (int(extent) + 1) * tensor.element_size()
        return cls(what, name, tensor, (str(tensor.device), memory), start, stop)

    def overlaps(self, other: _Held) -> bool:
        """Whether some byte belongs to both, whose ranges overlap: columns of one matrix share none."""
        if self.tensor.is_contiguous() and other.tensor.is_contiguous():
            return True
        first = min(self.start, other.start)
        used = [torch.zeros(max(self.stop, other.stop) - first, dtype=torch.bool) for _ in range(2)]
        for held, mask in zip((self, other), used, strict=True):
            size = held.tensor.element_size()
            strides = [stride * size for stride in held.tensor.stride()]
            mask.as_strided((*held.tensor.shape, size), (*strides, 1), held.start - first).fill_(True)
        return bool((used[0] & used[1]).any())


def _check_memory(model: nn.Module) -> None:
    """See that no parameter shares memory with another tensor: it would lie in a buffer, and the other would not.

    The same ``Parameter`` under several names is one tensor. Buffers may share memory among each other.
    """
    held = sorted(_tensors(model), key=lambda each: (each.memory, each.start))
    reach: list[_Held] = []  # those that may still overlap with what follows
    for each in held:
        reach = [one for one in reach if one.memory == each.memory and one.stop > each.start]
        for other in reach:
            if "parameter" in (each.what, other.what) and each.overlaps(other):
                first, second = sorted((each, other), key=lambda one: one.what != "parameter")
                if second.what == "parameter":
                    advice = "To tie them, let both names hold the same Parameter object (a.weight = b.weight)"
                else:
                    advice = f"Read the parameter where it is used, or give the {second.what} a copy (.clone())"
                raise ModelError(
                    f"parameter {first.name!r} and {second.what} {second.name!r} share memory, which ends when the "
                    f"engine moves parameters into its own buffers. {advice}."
                )
        reach.append(each)


def _tensors(model: nn.Module) -> Iterator[_Held]:
    """Each tensor of ``model`` once, under its first name: parameters, buffers, and plain attributes."""
    seen: set[Tensor] = set()

    def held(what: str, name: str, tensor: Any) -> Iterator[_Held]:
        if not isinstance(tensor, Tensor) or is_sealed(tensor) or tensor in seen:
            return
        seen.add(tensor)
        special = isinstance(
            tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)
        ) or is_traceable_wrapper_subclass(tensor)
        if not special and tensor.layout is torch.strided and tensor.numel():
            yield _Held.of(what, name, tensor)

    for name, param in model.named_parameters():
        yield from held("parameter", name, param)
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, buffer in module._buffers.items():
            yield from held("buffer", prefix + name, buffer)
        for name, value in vars(module).items():
            if f"{name}_orig" in module._parameters:
                continue  # of spectral_norm and pruning, which write it again in each forward
            several = isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor)
            for each in value if several else (value,):
                yield from held("attribute", prefix + name, each)


_CONTAINERS: Callable[[dict[str, Any]], tuple[dict[str, Any], ...]] = itemgetter("_modules", "_parameters")


class HeldParameters:
    """Which parameters a model holds, and where, as ``initialize`` found it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names = self._parameters()
        self._look()

    def _look(self) -> None:
        self._modules = [vars(module) for module in self._model.modules()]
        self._slots = self._all()

    def _all(self) -> list[Any]:
        """All modules and parameters that the modules hold, in order. No Python per parameter: a forward calls it."""
        return [*chain.from_iterable(map(dict.values, chain.from_iterable(map(_CONTAINERS, self._modules))))]

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: param for param, names in first_names(self._model).items() for name in names}

    def check(self) -> None:
        """See that the model still holds what it held, under the same names.

        Modules without parameters may come and go. Plain tensors instead of parameters, as
        ``torch.func.functional_call`` puts them there for a call, are left to the caller.

        Raises:
            ModelError: naming what is new, gone, or another.
        """
        found = self._all()
        if len(found) == len(self._slots) and all(map(is_, found, self._slots)):
            return
        swapped = {
            join(path, name)
            for path, module in self._model.named_modules(remove_duplicate=False)
            for name, param in module._parameters.items()
            if param is not None and not isinstance(param, nn.Parameter)
        }
        now = self._parameters()
        gone = [name for name in self._names if name not in now]
        new = [name for name in now if name not in self._names]
        other = [
            name
            for name, param in self._names.items()
            if name in now and name not in swapped and now[name] is not param
        ]
        if not (gone or new or other):
            if not swapped:
                self._look()
            return
        changes = [
            f"{_subject(names)} {what}" for names, what in ((other, "another"), (new, "new"), (gone, "gone")) if names
        ]
        raise ModelError(
            f"the model was changed after initialize: {', '.join(changes)}. The engine trains, saves and shows the "
            f"parameters that it was given. Change the model before shardline.initialize; or save_checkpoint(), "
            f"destroy() the engine, change the model, initialize again and load_checkpoint(load_module_strict=False)."
        )


def _subject(names: list[str]) -> str:
    shown = listed([repr(name) for name in names], 3)
    return f"parameter {shown} is" if len(names) == 1 else f"parameters {shown} are"
