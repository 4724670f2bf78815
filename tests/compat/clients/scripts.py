"""Run a client's script as its users do, and read the figures that it leaves."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent


def needs(*packages: str) -> list[pytest.MarkDecorator]:
    """Marks of a test module that runs real packages: skipped, with the reason, where one is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    reason = f"needs {', '.join(missing)}: make test-deepspeed"
    return [pytest.mark.skipif(bool(missing), reason=reason), pytest.mark.timeout(600)]


def run(script: str, out: Path, cases: list[dict[str, Any]], world: int = 0, timeout: float = 280.0) -> list[Any]:
    """The figures of ``cases``, one after the other in one start: without DeepSpeed for ``world`` 0, else on ranks."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable]
    if world == 1:
        command += ["-m", "shardline.compat.deepspeed"]
    elif world:
        command += ["-m", "shardline.cli", "run", "--as-deepspeed", "--no_local_rank", "--num_gpus", str(world)]
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_DEEPSPEED")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [*command, str(HERE / script), str(out), json.dumps(cases)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    found: list[Any] = json.loads((out / "figures.json").read_text())
    return found
