"""Reads an ``nn.Module`` into the values that the plan is made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from shardline.errors import ModelError
from shardline.plan import ModuleSpec, ParamSpec
from shardline.precision import Precision

__all__ = ["blocks", "chosen_units", "describe_modules", "describe_params", "first_names", "is_below"]


def first_names(model: nn.Module) -> dict[nn.Parameter, tuple[str, ...]]:
    """Every parameter with all names under which the model holds it, in the order of the model's definition."""
    names: dict[nn.Parameter, tuple[str, ...]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names[param] = (*names.get(param, ()), name)
    return names


def describe_params(
    model: nn.Module, precision: Precision, groups: Mapping[str, int]
) -> tuple[list[ParamSpec], dict[str, nn.Parameter]]:
    """The specs of ``model``'s parameters, and the parameters themselves by first name.

    Args:
        groups: the optimizer's param group of every parameter that it holds, by first name. A parameter is trained if
            it is in here and requires a gradient.

    Raises:
        ModelError: for a parameter that cannot lie in a flat buffer.
    """
    dtypes: dict[nn.Parameter, torch.dtype] = {}
    for module in model.modules():
        for param in module._parameters.values():
            if param is not None:
                dtypes.setdefault(param, precision.param_dtype(module, param))
    specs, params = [], {}
    for param, names in first_names(model).items():
        if isinstance(param, nn.parameter.UninitializedParameter):
            raise ModelError(
                f"parameter {names[0]!r} is lazy and has no shape yet. Run one forward (a dry run) before "
                f"shardline.initialize."
            )
        if param.layout is not torch.strided or param.is_complex():
            raise ModelError(
                f"parameter {names[0]!r} is {'complex' if param.is_complex() else param.layout}; the engine manages "
                f"dense real parameters. Store it as a dense real tensor (torch.view_as_real for complex ones)."
            )
        params[names[0]] = param
        specs.append(
            ParamSpec(
                name=names[0],
                aliases=names,
                shape=tuple(param.shape),
                stride=_dense_stride(param),
                dtype=dtypes[param],
                group=groups.get(names[0]) if param.requires_grad else None,
            )
        )
    return specs, params


def _dense_stride(param: Tensor) -> tuple[int, ...]:
    """The strides under which ``param`` fills a range of ``numel`` elements: its own (channels_last) if they do."""
    sizes = [(stride, size) for stride, size in zip(param.stride(), param.shape, strict=True) if size != 1]
    expected = 1
    for stride, size in sorted(sizes):
        if stride != expected:
            return tuple(torch.empty(param.shape, device="meta").stride())
        expected *= size
    return tuple(param.stride())


def describe_modules(model: nn.Module) -> list[ModuleSpec]:
    """The specs of ``model``'s modules, each once, in the order of ``named_modules``."""
    names = first_names(model)
    return [
        ModuleSpec(
            path=path,
            kind=type(module).__name__,
            repeats=isinstance(module, (nn.ModuleList, nn.Sequential)),
            params=tuple(names[param][0] for param in module._parameters.values() if param is not None),
        )
        for path, module in model.named_modules()
    ]


def chosen_units(
    modules: Iterable[ModuleSpec], classes: Iterable[str], names: Iterable[str], suffixes: Iterable[str]
) -> list[str]:
    """Paths of the modules that the user wants as units: by class name, full path or end of path."""
    classes, names, suffixes = set(classes), set(names), tuple(suffixes)
    return [
        module.path
        for module in modules
        if module.kind in classes or module.path in names or (suffixes and module.path.endswith(suffixes))
    ]


def is_below(path: str, root: str) -> bool:
    """Whether the module at ``path`` lies inside the one at ``root``; everything lies inside ``""``, the model."""
    return not root or path.startswith(root + ".")


def blocks(model: nn.Module) -> list[str]:
    """Paths of the model's repeated blocks, outermost: what a ``ModuleList`` or ``Sequential`` holds.

    A block has parameters and is more than one layer of ``torch.nn``; a list of blocks is not itself a block.
    """
    found: list[str] = []

    def visit(path: str, module: nn.Module, repeated: bool) -> None:
        if repeated and _is_block(module):
            found.append(path)
            return
        for name, child in module.named_children():
            visit(f"{path}.{name}" if path else name, child, isinstance(module, (nn.ModuleList, nn.Sequential)))

    visit("", model, repeated=False)
    paths = {path for path, _ in model.named_modules()}  # a module that the model holds twice goes by its first path
    return [path for path in found if path in paths]


def _is_block(module: nn.Module) -> bool:
    if next(module.parameters(), None) is None or isinstance(module, nn.ModuleList):
        return False
    children = list(module.children())
    if not children:
        return not type(module).__module__.startswith("torch.nn.")
    return not isinstance(module, nn.Sequential) or not any(_is_block(child) for child in children)
