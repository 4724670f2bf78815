"""Modules that stage 3 gathers as one, marked in the model; ``initialize`` reads the marks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from shardline.errors import ModelError

__all__ = ["leaf_names", "set_z3_leaf_modules"]

_MARK = "_z3_leaf"


def leaf_names(model: nn.Module) -> list[str]:
    """The full names of the marked modules of ``model`` that hold parameters."""
    marked = [(name, module) for name, module in model.named_modules() if name and z3_leaf_module(module)]
    return [name for name, module in marked if next(module.parameters(), None) is not None]


def z3_leaf_module(model: nn.Module) -> bool:
    """Whether this module is marked."""
    return bool(vars(model).get(_MARK, False))


def z3_leaf_parameter(model: nn.Parameter) -> bool:
    """Always false: parameters are not marked, modules are."""
    return False


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """The marked modules of ``model``."""
    return [module for module in model.modules() if z3_leaf_module(module)]


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Mark this module, or take the mark off."""
    setattr(model, _MARK, flag)


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[type | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Mark all modules of these classes, given as such or by name.

    Raises:
        ModelError: if there is none.
    """
    wanted = list(leaf_module_classes)
    names = {each for each in wanted if isinstance(each, str)}
    kinds = tuple(each for each in wanted if isinstance(each, type))
    return _mark(model, lambda _, m: isinstance(m, kinds) or bool(names & _names_of(type(m))), raise_if_not_found)


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[type | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Take the mark off all modules of these classes."""
    found = set_z3_leaf_modules(model, leaf_module_classes, raise_if_not_found)
    for module in found:
        set_z3_leaf_module(module, False)
    return found


def set_z3_leaf_modules_by_name(
    model: nn.Module, module_names: Iterable[str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Mark the modules of these full names."""
    wanted = set(module_names)
    return _mark(model, lambda name, _: name in wanted, raise_if_not_found)


def set_z3_leaf_modules_by_suffix(
    model: nn.Module, module_name_suffixes: Iterable[str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Mark the modules whose full names end so."""
    ends = tuple(module_name_suffixes)
    return _mark(model, lambda name, _: name.endswith(ends), raise_if_not_found)


def _names_of(kind: type) -> set[str]:
    return {kind.__name__, kind.__qualname__, f"{kind.__module__}.{kind.__qualname__}"}


def _mark(model: nn.Module, chosen: Callable[[str, nn.Module], bool], raise_if_not_found: bool) -> list[nn.Module]:
    found = [module for name, module in model.named_modules() if chosen(name, module)]
    for module in found:
        set_z3_leaf_module(module, True)
    if not found and raise_if_not_found:
        raise ModelError(f"No module of {type(model).__name__} is of the given classes or names, so none is a leaf.")
    return found
