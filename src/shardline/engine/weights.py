"""Full weights for the user: as a state dict under the model's own names, or gathered in place for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardline.checkpoint.engine.extra import EXTRA_KEY, shared_extra
from shardline.comm import Comm
from shardline.errors import UsageError
from shardline.plan.describe import persistent_buffers
from shardline.runtime.modes import outside_modes
from shardline.sharding.build import Layout
from shardline.sharding.fragments import full_weights
from shardline.sharding.hooks import Hooks
from shardline.sharding.unit import Unit
from shardline.watch import Status

__all__ = ["full_state_dict", "gathered", "names_of", "units_of"]


def full_state_dict(
    model: nn.Module, layout: Layout, comm: Comm, dtype: torch.dtype | None, *, wanted: bool
) -> dict[str, Any]:
    """What ``model.state_dict()`` holds of the unsharded model, on CPU and in its order. Collective.

    Those are weights, persistent buffers, and what modules return from ``get_extra_state()``.

    Args:
        model: the user's model, laid out as ``layout``.
        layout: one unit at a time is gathered on every rank.
        comm: for buffers and extra state, which are rank 0's.
        dtype: of floating weights; ``None`` leaves that of the masters.
        wanted: whether this rank keeps what it sees; else it gets an empty dict.
    """
    weights: dict[str, Tensor] = {}
    for unit in layout.units:
        unit.adopt_edits(restorable=True)
        for entry, tensor in full_weights(unit):
            if wanted:
                kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                value = tensor.detach().to("cpu", kept, copy=True)
                weights.update(dict.fromkeys(entry.param.aliases, value))
    buffers = dict(persistent_buffers(model))
    extra = shared_extra(model, comm)
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = path + "." if path else ""
        for name, param in module._parameters.items():
            if param is not None and wanted:
                found[prefix + name] = weights[prefix + name]
        for name in module._buffers:
            buffer = buffers.get(prefix + name)
            if buffer is not None:
                copy = buffer.detach().clone()  # statistics of a rank's own batches differ from the others'
                comm.messages.broadcast([copy])
                found[prefix + name] = copy.cpu()
        if prefix + EXTRA_KEY in extra:
            found[prefix + EXTRA_KEY] = extra[prefix + EXTRA_KEY]
    return found if wanted else {}


@contextmanager
def gathered(units: Sequence[Unit], hooks: Hooks, status: Status, *, write: bool) -> Iterator[None]:
    """Within it, ``units`` are gathered; with ``write``, what was changed is kept at the end. Collective.

    The backward of a graph that is built within it may come after it.

    Raises:
        UsageError: for a change without ``write``.
    """
    call = partial(status.call, "gathered_parameters")
    with call():
        _unshard(units)
    try:
        with hooks.around(units):
            yield
        with call():
            _write_back(units, write=write)
    finally:
        _reshard(units)


@outside_modes
def _unshard(units: Sequence[Unit]) -> None:
    for unit in units:
        unit.adopt_edits(restorable=True)
        unit.wait_for_unshard()
        unit.hold()


@outside_modes
def _write_back(units: Sequence[Unit], *, write: bool) -> None:
    """Write back what was changed in ``units``."""
    if write:
        for unit in units:
            unit.write_back()
        return
    edited = [name for unit in units for name in unit.edited()]
    if edited:
        raise UsageError(
            f"parameter {edited[0]!r} was changed inside gathered_parameters(). Pass write=True to keep changes on "
            f"every rank."
        )


@outside_modes
def _reshard(units: Sequence[Unit]) -> None:
    for unit in units:
        unit.unhold()
        unit.reshard()


def units_of(layout: Layout, params: Iterable[nn.Parameter | str] | nn.Module | None) -> list[Unit]:
    """The units that hold ``params``: parameters, their names, one of either, a module's, or all (``None``).

    Raises:
        UsageError: for what is not a parameter of the model.
    """
    if params is None:
        return list(layout.units)
    if isinstance(params, nn.Module):
        params = list(params.parameters())
    elif isinstance(params, (nn.Parameter, str)):
        params = [params]
    found = {layout.plan.where(name)[0].index for name in names_of(layout, params)}
    return [layout.units[index] for index in sorted(found)]


def names_of(layout: Layout, params: Iterable[nn.Parameter | str]) -> Iterator[str]:
    """The first name of each of ``params``.

    Raises:
        UsageError: for what is not a parameter of the model.
    """
    names = {alias: spec.name for spec in layout.plan.params for alias in spec.aliases}
    by_param = {param: name for name, param in layout.params.items()}
    for each in params:
        name = names.get(each) if isinstance(each, str) else by_param.get(each)
        if name is None:
            known = ", ".join(list(names)[:5])
            raise UsageError(f"{each!r} is not a parameter of this engine's model. Its parameters begin with {known}.")
        yield name
