"""The user's modes end where the engine's own tensor work begins.

A mode reaches every tensor operation of its thread: dispatch modes (selective checkpointing, loggers, fake tensors),
function modes (a default device), autocast, inference mode, and the levels of ``torch.func``. What the engine computes
for itself, in the middle of the user's forward, must not meet them: it would be cached and replayed, counted, put on
another device, or become a tensor that no later step may write to. So each entry into the engine does its work within
:func:`leave_modes`, or is marked with :func:`outside_modes`. Whether gradients are enabled stays as it is.

Nor does ``torch.compile`` trace that work, whatever around it the user compiles, the model or a whole step: a function
with :func:`leave_modes` inside that the model or autograd calls is marked with :func:`untraced`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch._C import (
    _DisableAutocast,
    _functorch,
    _InferenceMode,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    _pop_torch_dispatch_stack,
    _pop_torch_function_stack,
    _push_on_torch_dispatch_stack,
    _push_on_torch_function_stack,
    is_inference_mode_enabled,
)
from torch._C._functorch import peek_interpreter_stack, pop_dynamic_layer_stack, push_dynamic_layer_stack
from torch._compile import _disable_dynamo as untraced

__all__ = ["is_recorded", "keep", "leave_modes", "outside_modes", "untraced"]

P = ParamSpec("P")
T = TypeVar("T")

_kept: list[Any] = []
"""Modes that were entered for the engine's sake."""


_THERE_ARE_NONE = nullcontext()


def leave_modes() -> AbstractContextManager[None]:
    """Within it, no modes but those of :func:`keep` are active. Where there are none it costs 0.5 us."""
    if (
        _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _is_any_autocast_enabled()
        or is_inference_mode_enabled()
        or peek_interpreter_stack() is not None
    ):
        return _Outside()
    return _THERE_ARE_NONE


def outside_modes(function: Callable[P, T]) -> Callable[P, T]:
    """Let ``function`` run within :func:`leave_modes`, and untraced. On the hot path a block is better: no call on the
    stack."""

    @untraced
    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with leave_modes():
            return function(*args, **kwargs)

    return call


def is_recorded() -> bool:
    """Whether autograd records what is done here for a backward outside of all transforms of ``torch.func``."""
    levels = _functorch.get_interpreter_stack() or ()
    outer = (_functorch.CGradInterpreterPtr(level) for level in levels if level.key() == _functorch.TransformType.Grad)
    return torch.is_grad_enabled() and all(level.prevGradMode() for level in outer)


@contextmanager
def keep(mode: AbstractContextManager[T]) -> Iterator[T]:
    """Enter ``mode`` (or what enters modes) for the engine's own work too: fake tensors of a plan, a counter."""
    before = {id(each) for stack in _STACKS for each in stack.all()}
    with mode as entered:
        mine = [each for stack in _STACKS for each in stack.all() if id(each) not in before]
        _kept.extend(mine)
        try:
            yield entered
        finally:
            for each in mine:
                _kept.remove(each)


class _Stack:
    """A stack of modes of this thread."""

    def __init__(self, length: Callable[[], int], pop: Callable[[], Any], push: Callable[[Any], None]) -> None:
        self._length, self._pop, self._push = length, pop, push

    def all(self) -> list[Any]:
        """The modes, the innermost first."""
        modes = self.clear()
        self.fill(modes)
        return modes

    def clear(self) -> list[Any]:
        """Take all modes off, and return them, the innermost first."""
        return [self._pop() for _ in range(self._length())]

    def fill(self, modes: list[Any]) -> None:
        """Put ``modes``, the innermost first, on the empty stack."""
        for mode in reversed(modes):
            self._push(mode)


_STACKS = (
    _Stack(_len_torch_dispatch_stack, partial(_pop_torch_dispatch_stack, None), _push_on_torch_dispatch_stack),
    _Stack(_len_torch_function_stack, _pop_torch_function_stack, _push_on_torch_function_stack),
)


class _Outside(AbstractContextManager[None]):
    """Leaves the modes for a while."""

    def __enter__(self) -> None:
        self._levels = []
        while peek_interpreter_stack() is not None:
            self._levels.append(pop_dynamic_layer_stack())
        self._modes = [stack.clear() for stack in _STACKS]
        if _kept:
            for stack, modes in zip(_STACKS, self._modes, strict=True):
                stack.fill([mode for mode in modes if any(mode is each for each in _kept)])
        self._guards: list[AbstractContextManager[Any]] = []
        if is_inference_mode_enabled():
            with_grad = torch.is_grad_enabled()
            self._leave(_InferenceMode(False))
            torch._C._set_grad_enabled(with_grad)
        if _is_any_autocast_enabled():
            self._leave(_DisableAutocast())

    def _leave(self, guard: AbstractContextManager[Any]) -> None:
        guard.__enter__()
        self._guards.append(guard)

    def __exit__(self, *error: object) -> None:
        while self._guards:
            self._guards.pop().__exit__(None, None, None)
        for stack, modes in zip(_STACKS, self._modes, strict=True):
            stack.clear()
            stack.fill(modes)
        while self._levels:
            push_dynamic_layer_stack(self._levels.pop())
