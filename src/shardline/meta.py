"""Fills a model that was created on ``meta``, module by module, as its ordinary construction would have.

Modules are visited children first, which is the order in which constructors finish, and each one's
``reset_parameters`` runs on real CPU tensors. So with the same seed the same random numbers go to the same weights as
in an ordinary construction, while at any time only the tensors of one such module are whole on a rank. ``init_fn``
then visits the modules in the order of ``nn.Module.apply``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from shardline.errors import ModelError
from shardline.unit import Unit

__all__ = ["fill", "is_on_meta"]


def is_on_meta(model: nn.Module) -> bool:
    """Whether any parameter or buffer of ``model`` has no data."""
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def fill(
    model: nn.Module,
    names: dict[nn.Parameter, str],
    store: Callable[[str], None],
    units: Callable[[nn.Module], list[Unit]],
    init_fn: Callable[[nn.Module], None] | None,
) -> None:
    """Give everything on ``meta`` its values.

    Args:
        names: the first name of every parameter.
        store: takes the values of a parameter that is whole now into its unit, and lets the whole go.
        units: the units that hold a module's own parameters.
        init_fn: gets every module once all are filled.

    Raises:
        ModelError: naming every parameter and buffer that nothing has written.
    """
    unwritten: dict[str, Tensor] = {}
    filled: set[nn.Parameter] = set()
    stored: set[nn.Parameter] = set()
    paths = {module: path for path, module in model.named_modules()}

    def visit(module: nn.Module, keep: bool) -> None:
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        for child in module.children():
            # A module that resets itself may reach into its children (MultiheadAttention does): they stay until then.
            visit(child, keep or reset is not None)
        borrowed = _make_real(module, filled)
        if reset is not None and (borrowed or _is_filled_here(module, filled)):
            reset()
        for name, param in borrowed.items():  # tied, and filled where it was first: only the random numbers count here
            module._parameters[name] = param
        if not keep:
            for param in module.parameters():
                if param in filled and param not in stored:
                    finish(param)
        for name, buffer in module._buffers.items():
            if buffer is not None and _has_nan(buffer):
                unwritten[_join(paths[module], name)] = buffer

    def finish(param: nn.Parameter) -> None:
        stored.add(param)
        if _has_nan(param):
            unwritten[names[param]] = param
        store(names[param])

    visit(model, keep=False)
    if init_fn is not None:
        _apply(model, init_fn, units, unwritten, names, paths)
    if unwritten:
        raise ModelError(
            f"nothing gave these tensors of the model on meta a value: {', '.join(unwritten)}. Give their modules a "
            f"reset_parameters() that writes them, or pass init_fn= to initialize."
        )


def _make_real(module: nn.Module, filled: set[nn.Parameter]) -> dict[str, nn.Parameter]:
    """Turn the module's own meta tensors into real ones full of NaN; return those that are tied to filled ones.

    For these the module gets a tensor to waste, so that its reset draws the numbers it would have drawn.
    """
    borrowed: dict[str, nn.Parameter] = {}
    for name, param in module._parameters.items():
        if param is None:
            continue
        if param in filled:
            borrowed[name] = param
            module._parameters[name] = nn.Parameter(torch.empty(param.shape, dtype=param.dtype), param.requires_grad)
        elif param.is_meta:
            real = type(param)(_unset(param), param.requires_grad)
            real.__dict__.update(param.__dict__)
            torch.utils.swap_tensors(param, real)  # the object stays: optimizers and ties refer to it
            filled.add(param)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            module._buffers[name] = _unset(buffer)
    return borrowed


def _is_filled_here(module: nn.Module, filled: set[nn.Parameter]) -> bool:
    own = [param for param in module.parameters() if param in filled]
    return bool(own) or any(buffer is not None for buffer in module._buffers.values())


def _unset(like: Tensor) -> Tensor:
    value = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    return value.fill_(float("nan")) if like.is_floating_point() else value.zero_()


def _has_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(torch.isnan(tensor).any())


def _apply(
    model: nn.Module,
    init_fn: Callable[[nn.Module], None],
    units: Callable[[nn.Module], list[Unit]],
    unwritten: dict[str, Tensor],
    names: dict[nn.Parameter, str],
    paths: dict[nn.Module, str],
) -> None:
    """``model.apply(init_fn)`` with the units of the modules at hand gathered; neighbours share a gather."""
    held: list[Unit] = []
    for module in _post_order(model):
        wanted = units(module)
        if wanted and {unit.index for unit in wanted} != {unit.index for unit in held}:
            _let_go(held)
            held = wanted
            for unit in held:
                unit.wait()
                unit.holds += 1
        init_fn(module)
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            key = names[tensor] if isinstance(tensor, nn.Parameter) else _join(paths[module], name)
            if key in unwritten and not _has_nan(tensor):
                del unwritten[key]
    _let_go(held)


def _let_go(held: list[Unit]) -> None:
    for unit in held:
        unit.write_back()
        unit.holds -= 1
        unit.release()


def _post_order(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _post_order(child)
    yield module


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
