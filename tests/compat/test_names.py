"""Names of DeepSpeed: found where they are asked for, refused in words where they are not offered, never shadowing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module

import pytest

import shardline.compat.deepspeed as deepspeed
from shardline.compat.deepspeed import refusals, table
from shardline.compat.deepspeed.finder import PATH
from shardline.errors import UsageError
from tests.compat.rows import differs


@pytest.mark.parametrize("module", sorted({*table.NAMES, *table.FILES, *table.ALIASES} - {""}))
def test_every_name_of_the_table_is_there(module):
    found = import_module(f"{table.PACKAGE}.{module}")
    for name in table.NAMES.get(module, ()):
        assert getattr(found, name) is not None


def test_names_of_the_package_and_paths_of_attributes():
    for name in table.NAMES[""]:
        assert getattr(deepspeed, name) is not None
    assert deepspeed.runtime.lr_schedules.VALID_LR_SCHEDULES
    assert deepspeed.runtime.zero.partition_parameters.Init is deepspeed.zero.Init
    assert deepspeed.comm.comm is deepspeed.comm is deepspeed.dist
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        deepspeed.runtime.nonsense  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        import_module("shardline.compat.deepspeed.nonsense")


@pytest.mark.parametrize("module", sorted(refusals.MODULES))
def test_modules_that_are_not_offered_can_be_imported(module):
    found = import_module(f"{table.PACKAGE}.{module}.and_below")
    with pytest.raises(UsageError, match=f"deepspeed.{module}.and_below.Thing is not offered"):
        found.Thing(1)


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in refusals.NAMES.items() for name in names]
)
def test_names_that_are_not_offered_raise_when_they_are_used(module, name):
    found = getattr(import_module(f"{table.PACKAGE}.{module}".rstrip(".")), name)
    assert not isinstance(1, found)
    with pytest.raises(UsageError, match="is not offered by Shardline's stand-in: "):
        found()
    with pytest.raises(UsageError):
        found.attribute  # noqa: B018
    with pytest.raises(UsageError):
        type("Derived", (found,), {})


def python(code: str, **environment: str) -> list[object]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", f"import json, sys\n{code}"],
        env={**kept, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@differs(
    "`import deepspeed` where a real DeepSpeed is installed", "", "the real one, unless `--as-deepspeed` was given"
)
def test_it_stands_in_where_it_was_asked_to_and_nowhere_else(tmp_path):
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("real = True\n")
    real = os.pathsep.join([*sys.path, str(tmp_path)])
    ask = "import shardline.compat.deepspeed, deepspeed\nprint(json.dumps([hasattr(deepspeed, 'real')]))"
    assert python(ask, PYTHONPATH=real) == [True]
    look = (
        "import subprocess, importlib.metadata, importlib.util, deepspeed, deepspeed.runtime.engine as e\n"
        "from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint\n"
        "import shardline.compat.deepspeed as own\n"
        "child = subprocess.run([sys.executable, '-c', 'import deepspeed; print(deepspeed.__version__)'],\n"
        "                       capture_output=True, text=True).stdout.strip()\n"
        "print(json.dumps([deepspeed is own, e.DeepSpeedEngine is own.DeepSpeedEngine,\n"
        "                  importlib.metadata.version('deepspeed'),\n"
        "                  importlib.util.find_spec('deepspeed') is not None, child]))"
    )
    version = deepspeed.__version__
    assert python(look, PYTHONPATH=os.pathsep.join([PATH, real])) == [True, True, version, True, version]


def test_import_touches_no_device_and_no_engine():
    code = (
        "import shardline.compat.deepspeed\n"
        "print(json.dumps([name for name in ('torch', 'shardline.engine') if name in sys.modules]))"
    )
    assert python(code) == []
