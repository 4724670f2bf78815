"""The job files of examples/jobs: Ray Train runs, and gives the losses of torchrun; the others are read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.clients import needs

JOBS = Path(__file__).parents[2] / "examples" / "jobs"
pytestmark = needs("ray", "yaml")


def run(folder: Path, *command: object, **variables: str) -> list[list[float]]:
    """The losses that each rank leaves in ``folder``."""
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in left_out}
    source = str(JOBS.parents[1] / "src")
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=clean | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": source} | variables,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(file.read_text()) for file in sorted(folder.glob("?.json"))]


def test_ray_train(tmp_path) -> None:
    for name in ("torchrun", "ray", "again"):
        (tmp_path / name).mkdir()
    wanted = run(
        tmp_path / "torchrun",
        "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", 0, "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", JOBS / "train.py", "--steps", 20, "--out", tmp_path / "torchrun",
    )  # fmt: skip
    assert len(wanted) == 2 and wanted[0] != wanted[1] and wanted[0][-1] < wanted[0][0]
    quiet = {"RAY_USAGE_STATS_ENABLED": "0"}
    ray = [JOBS / "ray_train.py", "--folder", tmp_path / "kept", "--storage", tmp_path / "storage"]
    first = run(tmp_path / "ray", *ray, "--steps", 10, "--out", tmp_path / "ray", **quiet)
    rest = run(tmp_path / "again", *ray, "--steps", 20, "--out", tmp_path / "again", **quiet)  # resumes
    for rank in range(2):
        assert first[rank] + rest[rank] == pytest.approx(wanted[rank], rel=1e-5)


def test_the_files_of_the_others_start_the_same_script() -> None:
    import yaml

    job = yaml.safe_load((JOBS / "kubernetes.yaml").read_text())
    master, worker = job["spec"]["pytorchReplicaSpecs"].values()
    assert (master["replicas"], worker["replicas"]) == (1, 3) and master["template"] == worker["template"]
    (pod,) = worker["template"]["spec"]["containers"]
    commands = [" ".join(pod["command"]), yaml.safe_load((JOBS / "skypilot.yaml").read_text())["run"]]
    commands.append((JOBS / "slurm.sh").read_text())
    assert subprocess.run(["bash", "-n", JOBS / "slurm.sh"]).returncode == 0
    for command in commands:
        assert "torchrun" in command or "shardline run" in command
        script, options = re.search(r"(examples/jobs/train\.py)(.*)", command).groups()
        assert (JOBS.parents[1] / script).exists()
        shown = subprocess.run([sys.executable, JOBS / "train.py", "--help"], capture_output=True, text=True).stdout
        assert all(option in shown for option in re.findall(r"--\w+", options))
