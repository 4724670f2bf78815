"""Values for a model on ``meta`` from a mapping that one rank reads, a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from shardline.comm import Comm
from shardline.errors import ModelError, UsageError, text_of
from shardline.names import join
from shardline.sharding.buffer import flat

__all__ = ["StreamedWeights"]

T = TypeVar("T", bound=Tensor)

_PART = 1 << 22
"""Elements that are sent at a time."""


class StreamedWeights:
    """An ``init_fn`` that writes what ``values`` holds: rank 0 reads, and all ranks get their part.

    Called with a module it writes the module's own buffers; its parameters are streamed by :meth:`params_of` and
    :meth:`stream`, which hold no more than one value.

    Args:
        model: some of it is on ``meta``.
        values: by the names of the model's ``state_dict()``. Every rank gives one with the same names.
        comm: of the ranks.

    Attributes:
        names: those of ``values``.

    Raises:
        UsageError: if nothing of ``model`` is on ``meta``.
        ModelError: for a name that the model does not have.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Tensor], comm: Comm) -> None:
        if not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            raise UsageError(
                "initialize was given values by init_fn=, and nothing of the model is on meta. Build it inside "
                "`with shardline.empty_weights():`, or load a real model by load_state_dict before initialize."
            )
        self.names = frozenset(values)
        self._paths = {module: path for path, module in model.named_modules()}
        self._values, self._comm = values, comm
        self._done: set[Tensor] = set()  # tied ones come once
        held = {
            join(path, name)
            for path, module in model.named_modules(remove_duplicate=False)
            for name in (*module._parameters, *module._buffers)
        }
        if unknown := sorted(self.names - held):
            raise ModelError(
                f"init_fn= holds {unknown[0]!r}"
                + (f" and {len(unknown) - 1} more names" if len(unknown) > 1 else "")
                + " that the model does not have. Give it under the names of the model's state_dict()."
            )

    def __call__(self, module: nn.Module) -> None:
        """Write the buffers that ``module`` itself holds. Collective."""
        for full, buffer in self._named(module, module._buffers):
            value = self._read(full, buffer.shape)
            with torch.no_grad():
                if value is None:
                    buffer.zero_()  # what rank 0 has written comes here
                else:
                    buffer.copy_(value)

    def params_of(self, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that ``module`` itself holds and ``values`` as well, by name; each once."""
        return self._named(module, module._parameters)

    def _named(self, module: nn.Module, held: Mapping[str, T | None]) -> Iterator[tuple[str, T]]:
        for name, tensor in held.items():
            full = join(self._paths[module], name)
            if tensor is not None and full in self.names and tensor not in self._done:
                self._done.add(tensor)
                yield full, tensor

    def stream(self, name: str, like: Tensor, put: Callable[[int, Tensor], None]) -> None:
        """Give the elements of ``name`` to ``put``, each part with its first element, in storage order. Collective.

        Args:
            like: of the shape, dtype and (dense) strides of the parameter.
        """
        value = self._read(name, like.shape)
        if value is not None and (value.dtype != like.dtype or value.stride() != like.stride()):
            value = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).copy_(value)
        for start in range(0, like.numel(), _PART):
            stop = min(start + _PART, like.numel())
            part = torch.empty(stop - start, dtype=like.dtype) if value is None else flat(value)[start:stop]
            self._comm.messages.broadcast([part])
            put(start, part)
            self._comm.wait_for_readers()

    def _read(self, name: str, shape: torch.Size) -> Tensor | None:
        """The value of ``name``, on rank 0. Collective."""
        value, problem = None, None
        if self._comm.data.rank == 0:
            try:
                value = self._values[name]
                if value.shape != shape:
                    problem = f"has the shape {tuple(value.shape)}, and the model's {tuple(shape)}"
            except Exception as error:
                problem = f"cannot be read: {type(error).__name__}: {text_of(error)}"
        problem = self._comm.messages.exchange(problem)[0]
        if problem is not None:
            raise ModelError(f"init_fn= of initialize: {name!r} {problem}.")
        return None if value is None else value.detach()
