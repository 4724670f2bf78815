"""Write docs/modules.md: every module of the package with the first sentence of its docstring, by level of imports.

    python docs/scripts/modules.py > docs/modules.md

The levels are those of the import contract in pyproject.toml, which `make check` holds.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "shardline"
HEAD = """# Modules

<!-- Written by `python docs/scripts/modules.py > docs/modules.md`; edit the docstrings and pyproject.toml instead. -->

Every module of `src/shardline`, highest level first. Imports go to lower levels only. The levels are the import
contract in `pyproject.toml`, which `make check` holds. [CONTRIBUTING.md](../CONTRIBUTING.md) has the order in which to
read them, [One step](engine.md) the order in which they act.
"""


def levels() -> list[list[str]]:
    """The names of the import contract, highest level first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [re.findall(r"[\w.]+", layer) for layer in layers]


def modules_of(name: str) -> list[Path]:
    """The files of a module or package, in alphabetical order, ``__init__`` first."""
    path = PACKAGE.joinpath(*name.split("."))
    found = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return [file for file in found if file.exists()]  # the contract has optional rooms


def sentence(path: Path) -> str:
    """The first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text.partition("\n\n")[0].replace("\n", " "))
    return line.replace("``", "`").replace("|", "\\|")


def document() -> str:
    lines = [HEAD]
    sections = {"The package": [PACKAGE / "__init__.py"]}
    ordered = levels()
    for number, names in enumerate(ordered):
        sections[f"Level {len(ordered) - 1 - number}"] = [path for name in names for path in modules_of(name)]
    for title, paths in sections.items():
        rows = [f"| `{path.relative_to(PACKAGE).as_posix()}` | {sentence(path)} |" for path in paths]
        lines += [f"## {title}", "", "| module | |", "|---|---|", *rows, ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())
