"""Scripts with the structure of DeepSpeed's examples (tests/compat/scripts), started as their users start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.compat.rows import unchanged

ROOT = Path(__file__).parents[2]
SMALL = {"unit_min_numel": 0, "stage3_param_persistence_threshold": 0}

pytestmark = pytest.mark.timeout(300)


def run(script: str, tmp_path: Path, *arguments: Any, world: int = 2, config: dict[str, Any] | None = None) -> Any:
    """The figures that rank 0 leaves."""
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "shardline.cli", "run", "--as-deepspeed", "--num_gpus", str(world)]
    command += [str(ROOT / "tests/compat/scripts" / script), "--out", str(out), *map(str, arguments)]
    if config is not None:
        file = tmp_path / "ds.json"
        file.write_text(json.dumps(config))
        command += ["--deepspeed", "--deepspeed_config", str(file)]
    set_by_launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in set_by_launchers}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(out.read_text())


@unchanged("scripts like DeepSpeed's examples", "CIFAR-10")
@pytest.mark.parametrize("stage", [3, pytest.param(0, marks=pytest.mark.slow)])
def test_cifar(tmp_path, stage):
    whole = run("cifar.py", tmp_path, "--stage", 0, world=1)
    assert whole["losses"][-1] < whole["losses"][0]
    found = run("cifar.py", tmp_path, "--stage", stage, "--deepspeed")
    assert found == {key: pytest.approx(value, rel=1e-4) for key, value in whole.items()}


@unchanged("scripts like DeepSpeed's examples", "in bf16 and fp16")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_cifar_in_half_precision(tmp_path, dtype):
    first = run("cifar.py", tmp_path, "--stage", 1, "--dtype", dtype)
    assert first["losses"][-1] < first["losses"][0]
    for stage in (2, 3):
        assert run("cifar.py", tmp_path, "--stage", stage, "--dtype", dtype) == {
            key: pytest.approx(value, rel=2e-2) for key, value in first.items()
        }


@unchanged("scripts like DeepSpeed's examples", "with `--moe`")
@pytest.mark.slow
def test_cifar_with_experts(tmp_path):
    options = ("--moe", "--num-experts", 2, 3, "--top-k", 1, "--mlp-type", "residual", "--noisy-gate-policy", "RSample",
               "--moe-param-group")  # fmt: skip
    first = run("cifar.py", tmp_path, "--stage", 0, *options)
    assert run("cifar.py", tmp_path, "--stage", 3, *options) == {
        key: pytest.approx(value, rel=1e-4) for key, value in first.items()
    }


def bert(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 1000,
        "prescale_gradients": False,
        "optimizer": {"type": "Lamb", "params": {"lr": 6e-3, "max_coeff": 0.3, "min_coeff": 0.01}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": 6e-3, "warmup_num_steps": 2, "total_num_steps": 20},
        },
        "gradient_clipping": 1.0,
        "wall_clock_breakdown": False,
        "zero_optimization": {"stage": stage, **SMALL},
        **more,
    }


@unchanged("scripts like DeepSpeed's examples", "BERT with LAMB and fp16, saved and resumed")
@pytest.mark.slow
def test_bert(tmp_path):
    fp16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 8}
    full = run("bert.py", tmp_path, "--save_dir", tmp_path / "saved", config=bert(1))
    assert full["losses"][-1] < full["losses"][0]
    resumed = run("bert.py", tmp_path, "--load_dir", tmp_path / "saved", config=bert(2))
    assert resumed["losses"] == pytest.approx(full["losses"][3:], rel=1e-5)
    assert resumed["rates"] == pytest.approx(full["rates"])
    half = run("bert.py", tmp_path, "--checkpoint_activations", config=bert(0, fp16=fp16))
    assert half["losses"] == pytest.approx(full["losses"], rel=2e-2)
    assert (half["skipped"], half["scale"]) == (0, 256)


@unchanged("scripts like DeepSpeed's examples", "a GAN of two engines in fp16")
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_gan(tmp_path, stage):
    config = {"train_micro_batch_size_per_gpu": 6, "gradient_clipping": 0.0, "zero_optimization": {"stage": 0}}
    full = run("gan.py", tmp_path, config=config)
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 8}, "zero_optimization": {"stage": stage, **SMALL}}
    half = run("gan.py", tmp_path, config=config | fp16)
    assert half["skipped"] == 0
    for name in ("D", "G"):
        assert half[name] == pytest.approx(full[name], rel=2e-2)


@unchanged("a loop of one's own", "`ds_to_universal`, `load_universal`, `offload_states`")
@pytest.mark.slow
def test_calls_around_the_loop(tmp_path):
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2, "warmup_max_lr": 1e-2}},
        "checkpoint": {"load_universal": True},
        "zero_optimization": {"stage": 3, **SMALL},
    }
    assert len(run("surface.py", tmp_path, "--save_dir", tmp_path / "saved", config=config)["losses"]) == 3


@unchanged("scripts like DeepSpeed's examples", "a residual network with `StepLR`, saved and resumed at another stage")
@pytest.mark.slow
def test_imagenet(tmp_path):
    config = {"train_batch_size": 8, "zero_optimization": {"stage": 0}}
    full = run("resnet.py", tmp_path, "--save", tmp_path / "saved", config=config)
    assert full["losses"][-1] < full["losses"][0]
    assert full["rate"] == pytest.approx(5e-4)
    sharded = {**config, "zero_optimization": {"stage": 3, **SMALL}}
    assert run("resnet.py", tmp_path, config=sharded)["losses"] == pytest.approx(full["losses"], rel=1e-4)
    resumed = run("resnet.py", tmp_path, "--resume", tmp_path / "saved", config=sharded)
    assert resumed["losses"] == pytest.approx(full["losses"][5:], rel=1e-3)
    assert resumed["rate"] == pytest.approx(5e-4)
