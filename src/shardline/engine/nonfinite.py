"""Where numbers go bad: the micro-batches of a step that was skipped are run again, and every module is looked at.

The step was skipped, so the weights are those that it had. What a forward gets and draws is kept until its window ends,
with the gradient that came back for its outputs: so the loss, which the script computes, need not be known.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardline.checkpoint.engine.randomness import RandomState
from shardline.comm import Comm
from shardline.engine.backwards import Backwards
from shardline.engine.calls import Calls
from shardline.events import Events, Notice
from shardline.sharding.containers import tensors_in
from shardline.sharding.hooks import ModuleHook
from shardline.sharding.precision import LossScaler
from shardline.sharding.step import HostVerdict

__all__ = ["NonFiniteSearch"]

_MOST = 256  # micro-batches that are kept: more are forwards whose backward never comes


@dataclass
class _MicroBatch:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: RandomState
    grads: dict[int, Tensor] = field(default_factory=dict)
    """Gradients of its outputs, by their place among the tensors of the output."""


class NonFiniteSearch:
    """Keeps what the model is given in a window, and runs it again.

    Args:
        model: whose forwards are kept.
        comm: of the ranks, which search together.
        events: get a notice of what is found.
    """

    def __init__(self, model: nn.Module, comm: Comm, events: Events) -> None:
        self._model, self._exchange, self._device, self._events = model, comm.messages.exchange, comm.device, events
        self._kept: deque[_MicroBatch] = deque(maxlen=_MOST)
        self._searching = False
        self._hooks = [
            model.register_forward_pre_hook(ModuleHook(self._keep), with_kwargs=True),
            model.register_forward_hook(ModuleHook(self._see_output)),
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._kept.clear()

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and not self._searching:
            self._kept.append(_MicroBatch(args, dict(kwargs), RandomState.now(self._device)))

    def _see_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled() or self._searching or not self._kept:
            return
        grads = self._kept[-1].grads

        def note(place: int) -> Callable[[Tensor], None]:
            def add(grad: Tensor) -> None:
                grads[place] = grads[place] + grad.detach() if place in grads else grad.detach().clone()

            return add

        for place, tensor in _differentiable(output):
            tensor.register_hook(note(place))

    def end_window(self, host: HostVerdict, scaler: LossScaler, step: int, backwards: Backwards, calls: Calls) -> None:
        """A window has ended by ``step``: where that was skipped, say why. Collective; the gradients are gone.

        That a dynamic loss scale was too large is nothing to search for.

        Args:
            host: the verdict.
            scaler, backwards, calls: the engine's.
        """
        ordinary = scaler.dynamic and scaler.scale > scaler.minimum and math.isfinite(host.loss or 0.0)
        try:
            if host.skipped and not host.late and not ordinary:
                self._events.emit(Notice(self._search(host.loss, step, backwards, calls)))
        finally:
            self._kept.clear()

    def _search(self, loss: float | None, step: int, backwards: Backwards, calls: Calls) -> str:
        head = f"the gradients of step {step} were not finite"
        if loss is not None:
            head += f", of a finite loss ({loss:.6g})" if math.isfinite(loss) else ", and so was the loss"
        self._searching = True
        try:
            for number in range(min(self._exchange(len(self._kept)))):
                found = self._exchange(self._run(self._kept[number], backwards, calls))
                for rank, text in enumerate(found):
                    if text:
                        return f"{head}. In its micro-step {number + 1} on rank {rank} {text}"
        finally:
            self._searching = False
            backwards.discard()
        return (
            f"{head}. Run again, everything was: the model reads something that has changed since, or it is compiled "
            f"and its modules cannot be looked at"
        )

    def _run(self, batch: _MicroBatch, backwards: Backwards, calls: Calls) -> str:
        """What is bad in ``batch``, and where first; empty where nothing is."""
        now, looks = RandomState.now(self._device), _Looks(self._model)
        batch.random.restore(self._device)
        try:
            with torch.enable_grad(), looks.attached():
                with calls.through_engine():
                    output = self._model(*batch.args, **batch.kwargs)
                tensors = {place: tensor for place, tensor in _differentiable(output) if place in batch.grads}
                grads = [batch.grads[place] for place in tensors]
                looks.enter_backward(grads)
                if not grads:
                    backwards.join()
                    return looks.found
                with backwards.running(1.0, by_accumulation=True):
                    torch.autograd.backward(list(tensors.values()), grads)
                backwards.end()
        finally:
            now.restore(self._device)
        return looks.found


class _Looks:
    """Looks at what the modules of a model give, in forward and backward, until something is not finite."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self.found = model, ""

    def attached(self) -> ExitStack:
        """Within it modules and parameters are looked at."""
        stack = ExitStack()
        for name, module in self._model.named_modules():
            stack.callback(module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(partial(self._after, name)).remove)
        for name, param in self._model.named_parameters():
            if param.requires_grad:
                look = partial(self._gradient, f"the gradient of parameter {name!r}")
                stack.callback(param.register_hook(look).remove)
        return stack

    def enter_backward(self, grads: Sequence[Tensor]) -> None:
        if not all(map(_is_finite, grads)):
            self._note("the model's output is finite, and the gradient that the loss gives to it is not")

    def _note(self, text: str) -> None:
        self.found = self.found or text

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.found:
            return
        for own, param in module.named_parameters(recurse=False):
            if not _is_finite(param):
                self._note(f"the values of parameter {'.'.join(filter(None, (name, own)))!r} are not finite")
        if module is self._model and not all(map(_is_finite, tensors_in((args, kwargs)))):
            self._note("what the model is given is not finite")
        for _, tensor in _differentiable((args, kwargs)):
            tensor.register_hook(
                partial(self._gradient, f"the gradient that {_called(module, name)} gives to its input")
            )

    def _after(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not self.found and not all(map(_is_finite, tensors_in(output))):
            self._note(f"the output of {_called(module, name)} is the first that is not finite")

    def _gradient(self, what: str, grad: Tensor) -> None:
        if not self.found and not _is_finite(grad):
            self._note(f"all outputs are finite, and {what} is the first that is not")


def _called(module: nn.Module, name: str) -> str:
    return f"module {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())


def _differentiable(value: Any) -> list[tuple[int, Tensor]]:
    return [(place, tensor) for place, tensor in enumerate(tensors_in(value)) if tensor.requires_grad]
