"""Activation checkpointing by configuration: blocks run again in the backward instead of keeping their activations.

What runs again is the whole call of a block, the engine's hooks around it included: a sharded block is gathered for it
as for any other use. A block may write into the lists and objects that it gets (a key/value cache), so each later run
gets them as they were before the first.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from shardline.errors import ModelError
from shardline.plan.describe import blocks

__all__ = ["recompute_blocks", "recomputed_blocks"]


def recomputed_blocks(model: nn.Module, every: int) -> list[nn.Module]:
    """Every n-th of ``model``'s blocks, from the first on.

    Raises:
        ModelError: if the model has no blocks.
    """
    modules = dict(model.named_modules())
    chosen = [modules[path] for path in blocks(model)[::every]]
    if not chosen:
        raise ModelError(
            f"activation_checkpointing is enabled, and {type(model).__name__} has no repeated blocks to recompute: no "
            f"nn.ModuleList or nn.Sequential of modules that are more than one layer. Put its blocks into one, or "
            f"remove the key and call torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False) in the model."
        )
    return chosen


def recompute_blocks(modules: Sequence[nn.Module], *, offload: bool) -> Callable[[], None]:
    """Let the calls of ``modules`` run again in the backward; return what undoes it.

    Random numbers are the same in both runs, and running statistics count the first alone. Without gradients nothing
    changes.

    Args:
        offload: keep the tensors that are passed to the modules by position in host memory until the backward.
    """
    for module in modules:
        # The one place where a module looks for another call of itself than its class's; it is neither copied nor
        # pickled with the module. Set past modules that hand attributes on to one inside them (torch.compile's).
        object.__setattr__(module, "_compiled_call_impl", _Again(module, offload))

    def undo() -> None:
        for module in modules:
            object.__setattr__(module, "_compiled_call_impl", _compiled_call(module))

    return undo


def _compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """What ``module.compile()`` calls instead of the module, if it was called."""
    call: Any = module._compiled_call_impl
    return call.compiled if isinstance(call, _Again) else call


class _Again:
    """The call of one module, which keeps its inputs and runs again when the backward wants more."""

    def __init__(self, module: nn.Module, offload: bool) -> None:
        self.compiled = _compiled_call(module)
        self._call = self.compiled or module._call_impl
        self._keep: Callable[[], AbstractContextManager[Any]] = (
            partial(save_on_cpu, pin_memory=True) if offload else nullcontext
        )
        self._norms = [inner for inner in module.modules() if isinstance(inner, _NormBase) and inner._buffers]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._call(*args, **kwargs)
        runs = _Runs(self._call, args, kwargs)
        with self._keep():
            return checkpoint(runs, *runs.tensors, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _on_copies(self._norms) if self._norms else nullcontext()


class _Runs:
    """The runs of one call: the first on the arguments themselves, later ones on copies of what they were before.

    Attributes:
        tensors: the tensors among the positional arguments. The caller of a run passes them: they may have been in host
        memory in between.
    """

    def __init__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = call
        self.tensors = [arg for arg in args if isinstance(arg, Tensor)]
        self._now: tuple[list[Any], dict[str, Any]] | None
        self._now = [_PASSED if isinstance(arg, Tensor) else arg for arg in args], kwargs
        self._before = copy_structure(self._now)

    def __call__(self, *tensors: Tensor) -> Any:
        args, kwargs = self._now or copy_structure(self._before)
        self._now = None
        passed = iter(tensors)
        return self._call(*(next(passed) if arg is _PASSED else arg for arg in args), **kwargs)


class _Passed(Enum):
    TENSOR = 0


_PASSED = _Passed.TENSOR  # the place of a tensor


def copy_structure(value: Any) -> Any:
    """``value`` with new containers and new plain objects in it, down to what these hold, which is shared.

    Containers are lists, dicts, sets, deques and tuples, plain objects what Python code alone defines; subclasses and
    attributes included. Shared are tensors, modules, functions, keys of dicts and members of sets, objects that are
    implemented in C, and objects with a ``__del__`` (two would give back one resource twice). What ``value`` holds
    twice, the copy holds twice.
    """
    return _copy(value, {})


_SHARED = (Tensor, nn.Module, type, Enum, str, int, float, complex, bytes, type(None))
_MADE_BY = (OrderedDict, defaultdict, deque, list, dict, set, SimpleNamespace, object)  # a subclass before its base


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if isinstance(value, _SHARED) or hasattr(kind, "__del__"):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, tuple):
        items = [_copy(item, memo) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        if id(value) in memo:  # it holds itself, and was copied on the way
            return memo[id(value)]
        made = memo[id(value)] = tuple.__new__(kind, items)
    else:
        try:
            made = next(base for base in _MADE_BY if isinstance(value, base)).__new__(kind)
        except TypeError:  # C code makes such objects
            return value
        memo[id(value)] = made
        _copy_items(value, made, memo)
    _copy_attributes(value, made, memo)
    return made


def _copy_items(value: Any, made: Any, memo: dict[int, Any]) -> None:
    """By the methods of the built-in types: a subclass's own may do more than hold items."""
    if isinstance(value, dict):
        if isinstance(value, defaultdict):
            made.default_factory = value.default_factory
        base = OrderedDict if isinstance(value, OrderedDict) else dict
        for key, item in base.items(value):
            base.__setitem__(made, key, _copy(item, memo))
    elif isinstance(value, deque):
        deque.__init__(made, (_copy(item, memo) for item in deque.__iter__(value)), value.maxlen)
    elif isinstance(value, list):
        list.extend(made, [_copy(item, memo) for item in list.__iter__(value)])
    elif isinstance(value, set):
        set.update(made, set.__iter__(value))


def _copy_attributes(value: Any, made: Any, memo: dict[int, Any]) -> None:
    state = object.__getstate__(value)
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    if attributes:
        made.__dict__.update({name: _copy(item, memo) for name, item in attributes.items()})
    for name, item in (slots or {}).items():
        object.__setattr__(made, name, _copy(item, memo))


@contextmanager
def _on_copies(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let ``modules`` update copies of their buffers."""
    kept = [dict(module._buffers) for module in modules]
    for module, buffers in zip(modules, kept, strict=True):
        module._buffers.update({name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()})
    try:
        yield
    finally:
        for module, buffers in zip(modules, kept, strict=True):
            module._buffers.update(buffers)
