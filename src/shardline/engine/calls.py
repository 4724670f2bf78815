"""How the model is called: inputs cast and autocast entered as configured, and a notice where a call goes past that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import nn

from shardline.engine.notices import Notices
from shardline.sharding.containers import replace_tensors
from shardline.sharding.precision import Precision

__all__ = ["Calls"]


class Calls:
    """Calls of one model through its engine."""

    def __init__(self, model: nn.Module, precision: Precision, device: torch.device, notices: Notices) -> None:
        self._model, self._precision, self._device, self._notices = model, precision, device.type, notices
        self._depth = 0  # calls through the engine that run

    @contextmanager
    def through_engine(self) -> Iterator[None]:
        """Within it the model is called, under autocast where that is configured."""
        self._depth += 1
        try:
            if self._precision.autocast is None:
                yield
            else:
                with torch.autocast(self._device, dtype=self._precision.autocast):
                    yield
        finally:
            self._depth -= 1

    def cast(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """The arguments with floating tensors in the compute dtype, where inputs are cast."""
        if not self._precision.cast_inputs:
            return args, kwargs
        return self._precision.cast(args), self._precision.cast(kwargs)

    def output(self, output: Any) -> Any:
        """What the model returned, in fp32 where it ran under autocast."""
        dtype = self._precision.autocast
        if dtype is None:
            return output
        return replace_tensors(output, lambda tensor: tensor.float() if tensor.dtype is dtype else tensor)

    def method(self, method: MethodType) -> Callable[..., Any]:
        """A method of the model other than ``forward``: under autocast like it, but its arguments are not cast."""

        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                with self.through_engine():
                    output = method(*args, **kwargs)
            except Exception as error:
                if self._precision.explain(error, self._model):
                    error.add_note(
                        f"engine(...) casts inputs to {self._precision.compute}. engine.{method.__name__}(...) takes "
                        f"them as they are: give it tensors of that dtype."
                    )
                raise
            return self.output(output)

        return call

    @property
    def watches(self) -> bool:
        """Whether calls past the engine lack anything, so that :meth:`see` is needed."""
        return self._precision.autocast is not None or self._precision.cast_inputs

    def see(self, is_model: bool, given: Any) -> None:
        """A module of the model is called. Gives notice once where that goes past the engine and lacks something."""
        if self._depth:
            return
        precision = self._precision
        if precision.autocast is not None and not torch.is_autocast_enabled(self._device):
            self._notices.once(
                "engine.module, or a part of it, was called past the engine, where torch_autocast does not reach: it "
                "runs in the dtype of the weights. Call engine(...) or engine.method(...), or enter torch.autocast."
            )
        if is_model and precision.cast_inputs and (other := precision.not_cast(given)) is not None:
            self._notices.once(
                f"engine.module(...) was given a tensor of {other}, and weights are {precision.compute}: only "
                f"engine(...) casts its inputs. Call that, or give tensors of {precision.compute}."
            )
