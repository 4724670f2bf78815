"""Values for a model on ``meta`` from a mapping that one rank reads, a tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shardline.comm import Comm
from shardline.errors import ModelError, UsageError, text_of
from shardline.names import join

__all__ = ["StreamedWeights"]


class StreamedWeights:
    """An ``init_fn`` that writes what ``values`` holds: rank 0 reads, and all ranks get their part.

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
        """Write what ``module`` itself holds. Collective."""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            full = join(self._paths[module], name)
            if tensor is not None and full in self.names and tensor not in self._done:
                self._done.add(tensor)
                self._write(full, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        value, problem = None, None
        if self._comm.data.rank == 0:
            try:
                value = self._values[name]
                if value.shape != tensor.shape:
                    problem = f"has the shape {tuple(value.shape)}, and the model's {tuple(tensor.shape)}"
            except Exception as error:
                problem = f"cannot be read: {type(error).__name__}: {text_of(error)}"
        problem = self._comm.messages.exchange(problem)[0]
        if problem is not None:
            raise ModelError(f"init_fn= of initialize: {name!r} {problem}.")
        with torch.no_grad():
            if value is None:
                tensor.zero_()  # what rank 0 has written comes here
            else:
                tensor.copy_(value)
