"""Full weights for the user: as a state dict under the model's own names, or gathered in place for a while."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from shardline.checkpoint.engine.extra import EXTRA_KEY, shared_extra
from shardline.comm import Comm
from shardline.errors import UsageError
from shardline.features.sharded import edited
from shardline.plan.describe import persistent_buffers
from shardline.runtime.modes import outside_modes
from shardline.sharding.build import Layout
from shardline.sharding.fragments import full_weights
from shardline.sharding.hooks import Hooks
from shardline.sharding.unit import Unit
from shardline.watch import Status

__all__ = ["engines_of", "full_state_dict", "gathered", "gathered_parameters", "names_of", "note_engine", "units_of"]


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
def gathered_parameters(
    params: nn.Module | nn.Parameter | Iterable[nn.Parameter], write: bool = False
) -> Iterator[None]:
    """Within it, parameters are whole, before and after :func:`initialize`; with ``write`` they can be changed.

    They may be sharded by :func:`sharded_weights`, or by any number of engines; what is whole is left as it is. What
    was changed is taken over at the end, everywhere alike: rank 0's values win. Before ``initialize`` it may therefore
    be changed on rank 0 alone. Collective.

    Args:
        params: parameters, or a module for all of its own. They are whole at the same time.
        write: whether changes are kept. Changes without it raise.

    Raises:
        UsageError: for a change without ``write``.
    """
    found: list[nn.Parameter] = list(params.parameters() if isinstance(params, nn.Module) else
                                     [params] if isinstance(params, nn.Parameter) else params)  # fmt: skip
    with ExitStack() as held:
        held.enter_context(edited(found, source=0 if write else None))
        for engine, mine in engines_of(found):
            held.enter_context(engine.gathered_parameters(mine, write=write))
        yield


class _Engine(Protocol):
    module: nn.Module

    def gathered_parameters(self, params: Iterable[nn.Parameter], write: bool = ...) -> AbstractContextManager[None]:
        """See :meth:`Engine.gathered_parameters`."""


_ENGINES: WeakValueDictionary[int, _Engine] = WeakValueDictionary()
_NUMBERS = itertools.count()


def note_engine(engine: _Engine) -> Callable[[], None]:
    """Let :func:`engines_of` find ``engine``, until what this returns is called."""
    number = next(_NUMBERS)
    _ENGINES[number] = engine

    def forget() -> None:
        _ENGINES.pop(number, None)

    return forget


def engines_of(params: Sequence[nn.Parameter]) -> list[tuple[Any, list[nn.Parameter]]]:
    """The engines that hold some of ``params``, each with its own ones, in the order in which they were made.

    That order is the same on every rank, so collectives may follow it.
    """
    found: list[tuple[Any, list[nn.Parameter]]] = []
    for _, engine in sorted(_ENGINES.items()):
        held = set(engine.module.parameters())
        if mine := [param for param in params if param in held]:
            found.append((engine, mine))
    return found


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
