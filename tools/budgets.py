"""Sizes that must not grow back: the longest class, function and file of the package, and the fields of a class.

    python tools/budgets.py          # exits with 1 and names everything that is over its budget
    python tools/budgets.py --list   # the largest of each kind

A budget is what the code has reached, not what it may become: lower it when the largest one has shrunk.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "src" / "shardline"

BUDGETS = {
    "lines of a file": 560,
    "lines of a class": 475,
    "methods of a class": 34,
    "private fields of a class": 14,
    "lines of a function": 59,
    "parameters of a function": 12,
}

EXCEPTIONS: dict[tuple[str, str], int] = {
    # Signatures that users know from elsewhere: DeepSpeed's initialize, MoE and OneCycle, the options of a loader.
    ("parameters of a function", "compat/deepspeed/experts.py: MoE.__init__"): 16,
    ("parameters of a function", "compat/deepspeed/start.py: initialize"): 13,
    ("parameters of a function", "data/loader.py: Loader.__init__"): 16,
    ("parameters of a function", "engine/initialize.py: initialize"): 15,
    ("parameters of a function", "moe/layer.py: MoE.__init__"): 14,
    ("parameters of a function", "optim/lr.py: OneCycle.__init__"): 15,
    ("parameters of a function", "optim/muon.py: MuonAdamW.__init__"): 14,
}
"""What is larger, by kind and place, with the size that it may have."""


@dataclass(frozen=True, order=True)
class Size:
    value: int
    kind: str
    where: str

    @property
    def is_over(self) -> bool:
        return self.value > EXCEPTIONS.get((self.kind, self.where), BUDGETS[self.kind])


def sizes(path: Path) -> Iterator[Size]:
    """Everything that has a budget in one file."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(PACKAGE).as_posix()
    yield Size(len(text.splitlines()), "lines of a file", name)
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from _sizes_of_class(node, f"{name}: {node.name}")
    for place, function in _functions(tree, ""):
        where = f"{name}: {place}"
        yield Size(_lines(function), "lines of a function", where)
        taken = function.args
        count = len(taken.posonlyargs) + len(taken.args) + len(taken.kwonlyargs)
        yield Size(count, "parameters of a function", where)


def _sizes_of_class(node: ast.ClassDef, where: str) -> Iterator[Size]:
    yield Size(_lines(node), "lines of a class", where)
    methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
    yield Size(len({each.name for each in methods}), "methods of a class", where)
    fields = {
        target.attr
        for each in ast.walk(node)
        for target in _targets(each)
        if isinstance(target.value, ast.Name) and target.value.id == "self" and target.attr.startswith("_")
    }
    yield Size(len(fields), "private fields of a class", where)


def _targets(node: ast.AST) -> Iterator[ast.Attribute]:
    """Attributes that ``node`` assigns."""
    found = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    for target in found:
        yield from (each for each in ast.walk(target) if isinstance(each, ast.Attribute))


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield prefix + child.name, child
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
            yield from _functions(child, f"{prefix}{child.name}.")
        else:
            yield from _functions(child, prefix)


def _lines(node: ast.ClassDef | ast.FunctionDef) -> int:
    """Its lines of code: a docstring of a function is no burden to its reader, but help."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        text = node.body[0]
        lines -= (text.end_lineno or text.lineno) - text.lineno + 1
    return lines


def main(arguments: list[str]) -> int:
    found = sorted((size for path in PACKAGE.rglob("*.py") for size in sizes(path)), reverse=True)
    if "--list" in arguments:
        for kind, budget in BUDGETS.items():
            print(f"{kind}, at most {budget}:")
            for size in [each for each in found if each.kind == kind][:8]:
                print(f"  {size.value:5d}  {size.where}{'  OVER' if size.is_over else ''}")
        return 0
    over = [size for size in found if size.is_over]
    for size in over:
        allowed = EXCEPTIONS.get((size.kind, size.where), BUDGETS[size.kind])
        print(f"{size.where} has {size.value} {size.kind.partition(' of ')[0]}; {size.kind}: at most {allowed}.")
    return bool(over)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
