"""The same training under DeepSpeed itself, in an environment of its own, and under the stand-in.

DEEPSPEED_PYTHON=.venv-bench/bin/python pytest tests/compat/test_parity.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.compat.rows import unchanged

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("DEEPSPEED_PYTHON", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not PYTHON, reason="DEEPSPEED_PYTHON names no interpreter: make test-deepspeed"),
]

STAGES = (0, 1, 2, 3)


def run(command: list[str], path: str, out: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = {**kept, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "tests/compat/clients/parity.py")
    done = subprocess.run(
        [*command, script, str(out), json.dumps(cases)], env=environment, capture_output=True, text=True, timeout=700
    )
    assert done.returncode == 0, done.stderr[-6000:]
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


def both(tmp_path: Path, dtype: str, steps: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Each stage's figures, DeepSpeed's and the stand-in's."""
    cases = [{"stage": stage, "dtype": dtype, "steps": steps} for stage in STAGES]
    theirs = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ours = [sys.executable, "-m", "shardline.cli", "run", "--as-deepspeed", "--no_local_rank", "--num_gpus", "2"]
    real = run(theirs, "", tmp_path / "real.json", cases)
    stand_in = run(ours, str(ROOT / "src"), tmp_path / "stand-in.json", cases)
    assert [each["is_stand_in"] for each in (*real, *stand_in)] == [False] * 4 + [True] * 4
    return real, stand_in


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest relative difference of two runs' losses."""
    return max(abs(x - y) / y for x, y in zip(a["losses"], b["losses"], strict=True))


@unchanged(
    "the same training with DeepSpeed 0.19.8", "50 steps at stages 0 to 3: fp32 losses, norms and weights within 1e-6"
)
def test_fp32(tmp_path):
    real, stand_in = both(tmp_path, "fp32", 50)
    for stage in STAGES:
        assert distance(stand_in[stage], real[stage]) < 1e-6
        assert stand_in[stage]["weights"] == pytest.approx(real[stage]["weights"], rel=1e-6)
        # DeepSpeed has no norm at stage 0.
        assert stand_in[stage]["norms"] == pytest.approx(real[stage or 1]["norms"], rel=2e-6)


@unchanged(
    "the same training with DeepSpeed 0.19.8",
    "bf16 no further from it than its stages are from each other (on a CPU it refuses fp16)",
)
def test_bf16(tmp_path):
    """No further from DeepSpeed than its stages are from each other. On a CPU it refuses fp16."""
    real, stand_in = both(tmp_path, "bf16", 100)
    among = max(distance(real[a], real[b]) for a, b in combinations(STAGES, 2))
    for stage in STAGES:
        assert distance(stand_in[stage], real[stage]) < max(among, 2e-2)
