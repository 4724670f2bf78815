"""Rules that CONTRIBUTING.md states, held over the source: who may know what."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "shardline"
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}

PRIVATE = {
    "checkpoint/engine/window.py": "foreach operations",
    "checkpoint/foreign/pickled.py": "storages are rebuilt without torch's unpickler",
    "engine/origin.py": "the registries of a module, which go back as they were",
    "engine/window_grads.py": "what a GradScaler and a plain loop call on gradients, without torch functions",
    "features/compiling.py": "what torch.compile calls instead of a module",
    "features/meta.py": "parameters and buffers on meta, and who writes them",
    "features/recompute.py": "the call of a module, which is replaced",
    "optim/amp.py": "the fused step of an optimizer",
    "optim/lamb.py": "foreach operations",
    "optim/lion.py": "foreach operations",
    "runtime/modes.py": "the modes of a thread",
    "runtime/process_group.py": "torch's registry of process groups, and their abort",
    "sharding/admission.py": "which storages parameters share",
    "sharding/averages.py": "foreach operations",
    "sharding/buffer.py": "who else holds a storage",
    "sharding/edits.py": "a parameter's data, past its class",
    "sharding/flat_grads.py": "foreach operations, and gradients past the class of a parameter",
    "sharding/gradient.py": "gradients past the class of a parameter",
    "sharding/hooks.py": "graphs and module hooks",
    "sharding/saved_tensors.py": "the stack of saved-tensor hooks",
    "sharding/parameter.py": "the class of a parameter",
    "sharding/step.py": "foreach operations",
    "testing.py": "whether a case leaves saved-tensor hooks behind",
}
"""Files that name private parts of torch, and for what."""

ENVIRONMENT = {
    "compat/deepspeed/launching.py",
    "integrations/pretrained.py",
    "launch/rendezvous.py",
    "launch/run.py",
    "launch/runner.py",
    "runtime/environment.py",
    "testing.py",
}
"""Files that read or write environment variables."""


def attributes(tree: ast.AST) -> Iterator[str]:
    """Dotted names: ``torch._C._autograd``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts = []
            while isinstance(node, ast.Attribute):
                parts.append(node.attr)
                node = node.value
            if isinstance(node, ast.Name):
                yield ".".join([node.id, *reversed(parts)])


def is_private(name: str) -> bool:
    first, *rest = name.split(".")
    return first in ("torch", "dist") and any(part.startswith("_") and not part.startswith("__") for part in rest)


def test_torchs_private_names_are_in_the_files_that_are_listed() -> None:
    found = {file for file, tree in TREES.items() if any(map(is_private, attributes(tree)))}
    assert found - set(PRIVATE) == set(), "add the file with its reason to PRIVATE, or move the use to one of them"


def test_the_environment_is_read_where_it_is_listed() -> None:
    def reads(tree: ast.AST) -> bool:
        return any(name.startswith(("os.environ", "os.getenv", "os.putenv")) for name in attributes(tree))

    assert {file for file, tree in TREES.items() if reads(tree)} <= ENVIRONMENT


def test_stages_are_rows_of_a_table_and_not_numbers_to_compare() -> None:
    def is_stage(node: ast.AST) -> bool:
        return (isinstance(node, ast.Name) and node.id == "stage") or (
            isinstance(node, ast.Attribute) and node.attr in ("stage", "number")
        )

    found = [
        f"{file}:{node.lineno}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and any(map(is_stage, [node.left, *node.comparators]))
        if not all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops)
        if not file.startswith(("plan/placement.py", "config/", "comm/"))
    ]
    assert found == []


def test_nothing_is_asserted_that_vanishes_with_the_optimizing_interpreter() -> None:
    found = [
        f"{file}:{node.lineno}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]
    assert found == []


BUILTIN = {
    "checkpoint/": "a file's wrong form, which its reader turns into a CheckpointError",
    "comm/": "what a caller in the package turns into its own error",
    "data/loader.py": "len() of a loader without a length raises what len() raises",
    "runtime/memory.py": "a device without figures of its memory",
    "launch/": "what the launcher turns into its own error",
    "runtime/shared_page.py": "where there is no such memory, its users do without",
    "sharding/": "what torch raises for the same mistake, so that those who catch it still do",
    "testing.py": "the harness' own",
}
"""Where other classes than those of errors.py are raised, and why."""


def test_users_get_errors_of_our_own_classes() -> None:
    ours = {
        "AssertionError",
        "AttributeError",
        "StopIteration",
        "SystemExit",
        "KeyboardInterrupt",
        "NotImplementedError",
    }
    found = [
        f"{file}:{node.lineno} {node.exc.func.id}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
        if isinstance(getattr(builtins, node.exc.func.id, None), type) and node.exc.func.id not in ours
        if not file.startswith(tuple(BUILTIN))
    ]
    assert found == []


def test_the_format_of_checkpoints_knows_no_ranks() -> None:
    """The import contract holds for our own modules; torch's it cannot tell apart."""
    found = [
        file
        for file, tree in TREES.items()
        if file.startswith("checkpoint/format/") and any("distributed" in name for name in imported(tree))
    ]
    assert found == []


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of what is imported, and of what is reached as an attribute of torch."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
    yield from (name for name in attributes(tree) if name.startswith("torch."))
