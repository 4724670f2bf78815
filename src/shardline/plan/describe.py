"""Reads an ``nn.Module`` into the values that the plan is made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from shardline.errors import ConfigError, ModelError
from shardline.names import closest, join, outwards
from shardline.plan import ModuleSpec, ParamSpec

__all__ = [
    "blocks",
    "chosen_units",
    "describe_modules",
    "describe_params",
    "first_names",
    "is_below",
    "persistent_buffers",
]


class Dtypes(Protocol):
    """Decides the dtype of each parameter; :class:`shardline.sharding.precision.Precision` is one."""

    @property
    def modules(self) -> Mapping[str, torch.dtype]:
        """What the user chose, by the name of a module or parameter, or by module class."""

    def param_dtype(self, module: nn.Module, param: Tensor, chosen: torch.dtype | None = None) -> torch.dtype:
        """The dtype of ``param``, held by ``module``, for which the user chose ``chosen``."""


def first_names(model: nn.Module) -> dict[nn.Parameter, tuple[str, ...]]:
    """Every parameter with all names under which the model holds it, in the order of the model's definition."""
    names: dict[nn.Parameter, tuple[str, ...]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names[param] = (*names.get(param, ()), name)
    return names


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that belong to the state of ``model``, under every name it has for them."""
    for path, owner in model.named_modules(remove_duplicate=False):
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                yield join(path, name), buffer


def describe_params(
    model: nn.Module, dtypes: Dtypes, groups: Mapping[str, int]
) -> tuple[list[ParamSpec], dict[str, nn.Parameter]]:
    """The specs of ``model``'s parameters, and the parameters themselves by first name.

    Args:
        groups: the optimizer's param group of every parameter that it holds, by first name. A parameter is trained if
            it is in here and requires a gradient.

    Raises:
        ModelError: for a parameter that cannot lie in a flat buffer.
        ConfigError: for a name in ``dtypes.modules`` that concerns no parameter.
    """
    found: dict[nn.Parameter, torch.dtype] = {}
    chosen = _chosen_dtypes(model, dtypes.modules)
    for module in model.modules():
        for param in module._parameters.values():
            if param is not None:
                found.setdefault(param, dtypes.param_dtype(module, param, chosen.get(param)))
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
                dtype=found[param],
                group=groups.get(names[0]) if param.requires_grad else None,
            )
        )
    return specs, params


def _chosen_dtypes(model: nn.Module, wanted: Mapping[str, torch.dtype]) -> dict[nn.Parameter, torch.dtype]:
    """What ``wanted`` says of each floating parameter: by the innermost module around it that is meant, or itself.

    A module or parameter is meant by its full name; by the end of its name, where nothing has that as its full name; or
    by its class. All that is below it is meant as well. A name goes before a class.

    Raises:
        ConfigError: for a key that means no parameter.
    """
    if not wanted:
        return {}
    kinds = {path: type(module).__name__ for path, module in model.named_modules(remove_duplicate=False)}
    names = first_names(model)
    full = {*kinds, *(name for aliases in names.values() for name in aliases)}

    def meant_by(path: str) -> list[str]:
        by_name = [key for key in wanted if key == path or (key not in full and path.endswith(f".{key}"))]
        return by_name + [key for key in wanted if key == kinds.get(path) and key not in by_name]

    chosen: dict[nn.Parameter, torch.dtype] = {}
    used: set[str] = set()
    for param, aliases in names.items():
        keys = [key for name in aliases for path in outwards(name) for key in meant_by(path)]
        if keys and param.is_floating_point():
            used.update(keys)
            chosen[param] = wanted[keys[0]]
    for key in wanted:
        if key not in used:
            raise _meaningless("data_types.module_dtypes", key, {*full, *kinds.values()})
    return chosen


def _meaningless(where: str, name: str, known: Iterable[str]) -> ConfigError:
    ends = {path.rpartition(".")[2] for path in known}
    close = closest(name, known) or closest(name, ends)
    hint = f"; did you mean {close!r}?" if close and close != name else "."
    return ConfigError(f"{where} names {name!r}, which matches no parameter of the model{hint}")


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
    """Paths of the modules that the user wants as units: by class name, full path or end of path.

    A unit is all that is below its module.

    Raises:
        ConfigError: for a name that means no module with parameters.
    """
    modules = list(modules)
    full = {path for module in modules if module.params for path in outwards(module.path)}
    kinds = {module.kind for module in modules if module.path in full}
    for where, wanted, known in (
        ("classes", classes, kinds),
        ("names", names, full),
        ("name_suffixes", suffixes, {path.rpartition(".")[2] for path in full}),
    ):
        for name in wanted:
            if name not in known and not (where == "name_suffixes" and any(path.endswith(name) for path in full)):
                raise _meaningless(f"zero_optimization.leaf_module.{where}", name, known)
    classes, names, ends = set(classes), set(names), tuple(suffixes)
    return [
        module.path
        for module in modules
        if module.path in full
        and (module.kind in classes or module.path in names or (ends and module.path.endswith(ends)))
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
            visit(join(path, name), child, isinstance(module, (nn.ModuleList, nn.Sequential)))

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
