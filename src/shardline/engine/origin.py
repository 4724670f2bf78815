"""The model and the optimizer as they were before ``initialize``, and how they are restored where that fails."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from shardline.plan.describe import first_names
from shardline.sharding.build import Layout
from shardline.sharding.fragments import full_weights
from shardline.sharding.parameter import make_ordinary, record_of
from shardline.sharding.sharded_param import sharded_param_of

__all__ = ["Origin"]


class Origin:
    """A model and an optimizer before an engine takes them. Keeps no copy: the engine has the values of parameters."""

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self._params = {
            names[0]: (param, param.dtype, param.device)
            for param, names in first_names(model).items()
            if not param.is_meta
        }
        found = {name: sharded_param_of(param) for name, (param, _, _) in self._params.items()}
        self._sharded = {name: param for name, param in found.items() if param is not None}
        self._on_meta = [
            (param, param.shape, param.stride(), param.dtype) for param in model.parameters() if param.is_meta
        ]
        self._buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
        self._optimizer = optimizer
        self._groups = [dict(group) for group in optimizer.param_groups] if optimizer is not None else []
        self._state = dict(optimizer.state) if optimizer is not None else {}
        held = (*model.parameters(), *model.buffers())
        self._writes = [(tensor, tensor._version) for tensor in held if tensor.is_meta]

    def restore(self, layout: Layout, error: BaseException) -> None:
        """Put everything back; add a note to ``error`` about what could not be. Collective.

        Afterwards ``layout`` has no units. What was on ``meta`` is there again.
        """
        self._restore_params(layout, error)
        for buffers, before in self._buffers:
            buffers.update(before)
        for tensor, version in self._writes:  # by which a later fill tells what the constructor wrote
            torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
        if self._optimizer is not None:
            del self._optimizer.param_groups[len(self._groups) :]
            for group, before in zip(self._optimizer.param_groups, self._groups, strict=True):
                group.clear()
                group.update(before)
            self._optimizer.state.clear()
            self._optimizer.state.update(self._state)

    def _restore_params(self, layout: Layout, error: BaseException) -> None:
        rounded = []
        for unit in layout.units:
            names = [entry.param.name for bucket in unit.buckets for entry in bucket.plan.entries]
            managed = {name for name in names if name in self._params and self._is_taken(name)}
            for entry, value in full_weights(unit) if managed else ():
                name = entry.param.name
                if name in managed:
                    param, dtype, device = self._params[name]
                    make_ordinary(param, value.to(device, dtype, copy=True))
                    if name in self._sharded:
                        self._sharded[name].shard(shared=True)
                    if torch.promote_types(dtype, value.dtype) != value.dtype:
                        rounded.append(name)
        for param, shape, stride, dtype in self._on_meta:
            if not param.is_meta:
                empty = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
                make_ordinary(param, torch.empty(0, dtype=param.dtype, device=param.device))
                torch._C._swap_tensor_impl(param, nn.Parameter(empty, param.requires_grad))  # .data takes none of meta
        layout.units.clear()
        if rounded:
            error.add_note(
                f"The model has its weights back. Those that are frozen were rounded meanwhile: {', '.join(rounded)}."
            )

    def _is_taken(self, name: str) -> bool:
        """Whether the values of a parameter are the engine's, or its parameter shows them."""
        if name in self._sharded:
            return self._sharded[name].elements is None
        return record_of(self._params[name][0]) is not None
