"""Modules that the table describes, and ``deepspeed`` as another name of this package where it stands in."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from shardline.compat.deepspeed import table

__all__ = ["PATH", "install", "stand_in"]

PACKAGE = table.PACKAGE
NAME = "deepspeed"
NAMESPACE = PACKAGE.removesuffix(NAME)

PATH = os.fspath(Path(__file__).with_name("path"))
"""A folder that holds a package ``deepspeed`` and its metadata, which hand over to this one: for sys.path."""


class _Table(ModuleType):
    """A module whose names the table gives when they are first asked for."""

    def __getattr__(self, name: str) -> Any:
        value = table.resolve(self.__name__.removeprefix(f"{PACKAGE}."), name)
        if not name.startswith("__"):
            setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        path = self.__name__.removeprefix(f"{PACKAGE}.")
        return sorted({*vars(self), *table.NAMES.get(path, ()), *table.submodules(path)})


class _TableLoader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Table(spec.name, f"Names of DeepSpeed's module deepspeed{spec.name.removeprefix(PACKAGE)}.")

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []


class _SameLoader(Loader):
    """A module under a second name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self._name)
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own


class _Finder(MetaPathFinder):
    """Finds the modules of the table below this package and, once it stands in, all of it below ``deepspeed``."""

    stands_in = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, inner = fullname.partition(f"{NAME}.")
        if package == NAMESPACE:
            if inner in table.ALIASES:
                return ModuleSpec(fullname, _SameLoader(f"{PACKAGE}.{table.ALIASES[inner]}"))
            if inner not in table.FILES and table.is_module(inner):
                return ModuleSpec(fullname, _TableLoader(), is_package=True)
        elif package == "" and self.stands_in and table.is_module(inner):
            return ModuleSpec(fullname, _SameLoader(f"{PACKAGE}.{inner}"), is_package=True)
        return None


_FINDER = _Finder()


def install() -> None:
    """Let the modules of the table be found."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def stand_in() -> None:
    """Make ``deepspeed`` in this process another name of this package. What is imported already stays as it is."""
    install()
    _FINDER.stands_in = True
    sys.modules[NAME] = import_module(PACKAGE)
