"""What the optimizer's state in a checkpoint must be before any of it is loaded: one from which the optimizer steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from shardline.checkpoint.engine.groups import Groups
from shardline.checkpoint.engine.restore import Match
from shardline.checkpoint.engine.view import EngineView, optimizer_name
from shardline.checkpoint.format.manifest import ParameterEntry
from shardline.checkpoint.format.reader import CheckpointReader
from shardline.checkpoint.format.values import decode, dtype_named
from shardline.errors import CheckpointError, shown
from shardline.optim.trial import step_from

__all__ = ["check_states"]

_LARGEST = 1 << 20
"""Elements: no larger parameter is tried with state that has a shape of its own."""


def check_states(engine: EngineView, reader: CheckpointReader, found: Match, groups: Groups) -> None:
    """Parameters whose optimizer state has the same tensors have the same numbers, too, and the optimizer can step from
    each form that there is: else it would fail in the middle of a step.

    Raises:
        CheckpointError: if not; names the parameter.
    """
    forms: dict[tuple[str, ...], dict[str, str]] = {}
    for name, entry in reader.parameters.items():
        if entry.state and forms.setdefault(tuple(sorted(entry.state)), _numbers(entry)) != _numbers(entry):
            raise CheckpointError(
                f"{reader.path} holds optimizer state of {shown(repr(name))} that differs in form from that of the "
                f"other parameters, which no optimizer makes. Nothing was loaded."
            )
    optimizer, tried = engine.optimizer, set[Any]()
    if optimizer is None:
        return
    for ours, index in engine.groups.items():
        name = found.params.get(ours, "")
        found_entry = reader.parameters.get(name)
        if found_entry is None or not (found_entry.state or found_entry.scalars):
            continue
        form = (index, _form(found_entry))
        shape = _shape(found_entry)
        if form in tried or math.prod(shape) > _LARGEST:
            continue
        tried.add(form)
        source = groups.sources[index] if groups.sources else None
        options = optimizer.param_groups[index] | ({} if source is None else groups.options[source])
        error = step_from(optimizer, options, shape, _small_state(found_entry, shape))
        if error is not None:
            raise CheckpointError(
                f"{reader.path} holds optimizer state of {shown(repr(name))} from which {optimizer_name(optimizer)} "
                f"cannot step ({type(error).__name__}: {shown(error, 200)}). Nothing was loaded; "
                f"load_optimizer_states=False leaves it out."
            )


def _form(entry: ParameterEntry) -> Any:
    """What a step can tell apart: dimensions, the kinds of numbers, the dtypes of tensors."""
    shapes = [None if stored.shape is None else tuple(stored.shape) for stored in entry.state.values()]
    own_shape = tuple(entry.shape) if any(shape is not None for shape in shapes) else None
    dtypes = tuple(stored.dtype for stored in entry.state.values())
    return len(entry.shape), own_shape, (*entry.state,), (*shapes,), dtypes, (*sorted(_numbers(entry).items()),)


def _shape(entry: ParameterEntry) -> tuple[int, ...]:
    """A small shape of as many dimensions, unless there is state whose shape goes with the parameter's own."""
    whole = any(stored.file is not None for stored in entry.state.values())
    return tuple(entry.shape) if whole else tuple(min(size, 8) for size in entry.shape)


def _small_state(entry: ParameterEntry, shape: tuple[int, ...]) -> dict[str, Any]:
    """State of this form: its own numbers, and zeros for tensors."""
    state = {key: decode(value, _no_tensor) for key, value in entry.scalars.items()}
    for key, stored in entry.state.items():
        as_weight = entry.weight is not None and stored.dtype == entry.weight.dtype
        dtype = torch.float32 if as_weight else dtype_named(stored.dtype)
        state[key] = torch.zeros(shape if stored.shape is None else stored.shape, dtype=dtype, device="cpu")
    return state


def _numbers(entry: ParameterEntry) -> dict[str, str]:
    """What kinds of values there are. Tensors without dimensions become numbers while a parameter is frozen, steps do
    not."""
    return {key: _kind(key, value) for key, value in entry.scalars.items()}


def _kind(key: str, value: Any) -> str:
    number = type(value) in (int, float) or (isinstance(value, dict) and "$scalar" in value)
    return "number" if number and key != "step" else type(value).__name__


def _no_tensor(key: str) -> Tensor:
    raise CheckpointError(f"the manifest refers to a tensor {key!r} where only numbers can be.")
