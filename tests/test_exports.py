from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import shardline

PUBLIC = {
    "EMA",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "DisagreementError",
    "Engine",
    "LaunchError",
    "LostRankError",
    "ModelError",
    "NonFiniteError",
    "OptimizerError",
    "SealedError",
    "ShardlineError",
    "UsageError",
    "__version__",
    "add_config_arguments",
    "empty_weights",
    "gathered_parameters",
    "get_accelerator",
    "init_distributed",
    "initialize",
    "shard",
    "sharded_weights",
}
SOURCE = Path(shardline.__file__)
HEAVY = {
    "matplotlib",
    "tqdm",
    "pandas",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.distributed.launcher",
    "torch.utils.tensorboard",
}


def imported_by(code):
    """The modules that ``code`` adds to a process that has imported torch, and whether CUDA was initialised."""
    program = (
        "import json, sys, torch\n"
        "calls = []\n"
        "torch.cuda._lazy_init = lambda: calls.append('init')\n"
        "torch._C._cuda_getDeviceCount = lambda: calls.append('count') or 0\n"
        "before = set(sys.modules)\n"
        f"{code}\n"
        "print(json.dumps([sorted(set(sys.modules) - before), calls]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_all_is_exactly_the_promise():
    assert set(shardline.__all__) == PUBLIC
    assert set(dir(shardline)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_name_is_there_and_documented(name):
    value = getattr(shardline, name)
    assert name == "__version__" or value.__doc__
    assert getattr(shardline, name) is value


def test_type_checkers_find_every_name_where_it_is_loaded_from():
    imports = re.findall(r"^    from shardline\.([\w.]+) import (\w+|\([^)]*\))$", SOURCE.read_text(), re.MULTILINE)
    homes = {name: home for home, names in imports for name in re.findall(r"\w+", names)}
    assert homes == shardline._HOMES


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'initialise'"):
        shardline.initialise  # noqa: B018


def test_import_loads_nothing_and_touches_no_device():
    modules, calls = imported_by("import shardline")
    assert [m for m in modules if m.startswith("shardline")] == ["shardline", "shardline._version"]
    assert not [m for m in modules if m.startswith(("torch", "pydantic"))]
    assert calls == []


def test_asking_for_every_name_loads_nothing_heavy_and_touches_no_device():
    modules, calls = imported_by("import shardline\nfor name in shardline.__all__: getattr(shardline, name)")
    heavy = {m for m in modules if any(m == h or m.startswith(f"{h}.") for h in HEAVY)}
    assert not heavy
    assert calls == []
