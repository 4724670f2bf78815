"""Activation checkpointing by configuration: blocks run again in the backward instead of keeping what they made.

What runs again is the whole call of a block, the engine's hooks around it included: a sharded block is gathered for it
as for any other use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from shardline.describe import blocks
from shardline.errors import ModelError

__all__ = ["compiled_call", "recompute_blocks", "recomputed_blocks"]


def recomputed_blocks(model: nn.Module, every: int) -> list[nn.Module]:
    """Every so many of ``model``'s blocks, from the first on.

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
            object.__setattr__(module, "_compiled_call_impl", compiled_call(module))

    return undo


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """What ``module.compile()`` has put in the place of the module's call, if it was called."""
    call: Any = module._compiled_call_impl
    return call.compiled if isinstance(call, _Again) else call


class _Again:
    """The call of one module, which keeps its inputs and runs again when the backward wants more."""

    def __init__(self, module: nn.Module, offload: bool) -> None:
        self.compiled = compiled_call(module)
        self._call = self.compiled or module._call_impl
        self._keep: Callable[[], AbstractContextManager[Any]] = (
            partial(save_on_cpu, pin_memory=True) if offload else nullcontext
        )
        self._norms = [inner for inner in module.modules() if isinstance(inner, _NormBase) and inner._buffers]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._call(*args, **kwargs)
        call = partial(self._call, **kwargs) if kwargs else self._call
        with self._keep():
            return checkpoint(call, *args, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _on_copies(self._norms) if self._norms else nullcontext()


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
