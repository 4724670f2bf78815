"""Every key of the installed DeepSpeed is known here: typed, another name, without effect, or refused with a reason."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardline.config.catalogue import catalogue
from shardline.config.schema import Config

ROOT = Path(__file__).parents[2]
HOLDERS = {"param_dict": "", "data_types_params": "data_types", "checkpoint_params": "checkpoint"}
"""Variables of DeepSpeed's reader that hold a section, and its path."""
MODELS = {
    "runtime/zero/config.py": {"DeepSpeedZeroConfig": "zero_optimization"},
    "runtime/zero/leaf_module_config.py": {"DeepSpeedZeroLeafModuleConfig": "zero_optimization.leaf_module"},
    "runtime/zero/offload_config.py": {
        "DeepSpeedZeroOffloadParamConfig": "zero_optimization.offload_param",
        "DeepSpeedZeroOffloadOptimizerConfig": "zero_optimization.offload_optimizer",
    },
    "runtime/precision_config.py": {"DeepSpeedFP16Config": "fp16", "DeepSpeedBF16Config": "bf16"},
}


def source() -> Path | None:
    """Where DeepSpeed's modules lie: beside DEEPSPEED_PYTHON, or in the benchmark's environment."""
    python = os.environ.get("DEEPSPEED_PYTHON")
    home = Path(python).parents[1] if python else ROOT / ".venv-bench"
    return next(home.glob("lib/python3*/site-packages/deepspeed"), None)


def constants(package: Path) -> dict[str, str]:
    found = {}
    for file in (*package.glob("runtime/**/constants.py"), package / "runtime/config.py"):
        for node in ast.parse(file.read_text()).body:
            match node:
                case ast.Assign([ast.Name(id=name)], ast.Constant(value=str(word))) if word.isidentifier():
                    found.setdefault(name, word)
    return found


def read_keys(package: Path) -> Iterator[str]:
    """The keys that DeepSpeed's reader looks up by name, and the fields of its models of sections."""
    named = constants(package)

    def name_of(node: ast.AST) -> str | None:
        return named.get(node.id) if isinstance(node, ast.Name) else getattr(node, "value", None)

    def holder_of(node: ast.AST) -> str | None:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "keys":
            node = node.func.value
        return HOLDERS.get(node.id) if isinstance(node, ast.Name) else None

    for node in ast.walk(ast.parse((package / "runtime/config.py").read_text())):
        pairs = []
        if isinstance(node, ast.Call) and len(node.args) >= 2 and getattr(node.func, "id", "") == "get_scalar_param":
            pairs.append((node.args[0], node.args[1]))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get" and node.args:
            pairs.append((node.func.value, node.args[0]))
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In):
            pairs.append((node.comparators[0], node.left))
        for holder, key in pairs:
            section, name = holder_of(holder), name_of(key)
            if section is not None and isinstance(name, str):
                yield f"{section}.{name}" if section else name
    for file, models in MODELS.items():
        for node in ast.parse((package / file).read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name in models:
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        keywords = item.value.keywords if isinstance(item.value, ast.Call) else []
                        alias = [word.value.value for word in keywords if word.arg == "alias"]
                        yield from (f"{models[node.name]}.{name}" for name in (item.target.id, *alias))


def test_every_key_of_deepspeed_is_classified() -> None:
    package = source()
    if package is None:
        pytest.skip("needs DeepSpeed: `make bench` installs it into .venv-bench, or set DEEPSPEED_PYTHON")
    found = set(read_keys(package))
    assert len(found) > 100 and {"train_batch_size", "zero_optimization.stage", "bf16.enabled"} <= found
    assert sorted(key for key in found if key not in catalogue(Config)) == []
