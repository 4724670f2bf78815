"""The Trainer's benchmark: ratios are taken within a round, and the page says what was measured."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def trainer(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import trainer

    return trainer


def result(*walls):
    """Rounds in which each way took so long; memory and losses are made up."""
    ways = ("alone", "ddp", "in-place-2", "deepspeed-2", "shardline-2")
    rounds = [
        {way: {"wall": wall, "work": wall, "peak": 1e6, "loss": 7.0} for way, wall in zip(ways, each, strict=True)}
        for each in walls
    ]
    machine = {"cpu": "a CPU, 2 cores", "torch": "2", "transformers": "5", "python": "3", "load before": "0.00"}
    return {"date": "2026-01-01", "machine": machine, "rounds": rounds}


def test_ratios_are_taken_within_a_round(trainer) -> None:
    """Ratios of medians would be 2.00 of DDP, and 1.00 of DeepSpeed."""
    shown = trainer.section([result((1, 1, 2, 4, 3), (1, 2, 1, 1, 2), (1, 3, 6, 9, 1))])
    cells = [[cell.strip() for cell in line.split("|")] for line in shown.splitlines() if line[:1] == "|"]
    rows = {row[1]: row for row in cells}
    assert rows["Shardline in place, stage 2"][2:6] == ["2000", "2.00", "2.00", "0.67"]
    assert rows["Shardline as DeepSpeed, stage 2"][2:6] == ["2000", "2.00", "1.00", "0.75"]
    assert rows["DDP"][2:6] == ["2000", "2.00", "", ""]


def test_the_page_takes_the_figures(trainer) -> None:
    page = trainer.PAGE.read_text(encoding="utf-8")
    assert page.count(trainer.BEGIN) == page.count(trainer.END) == 1
    changed = trainer.written(page, [result((1, 1, 2, 4, 3))])
    assert trainer.section([result((1, 1, 2, 4, 3))]) in changed and changed.count("in place, stage 2 |") == 1
    assert (
        trainer.written(changed, [result((2, 1, 2, 4, 3))]).partition(trainer.BEGIN)[0]
        == page.partition(trainer.BEGIN)[0]
    )


def test_every_way_runs(trainer, tmp_path) -> None:
    if not all(importlib.util.find_spec(name) for name in ("transformers", "accelerate")):
        pytest.skip("needs transformers, accelerate: make test-integrations")
    options = ["--quick", "--rounds", "1", "--steps", "5", "--stages", "3", "--in-place", "2", "--out", str(tmp_path)]
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "DEEPSPEED_PYTHON")}
    command = [sys.executable, str(ROOT / "benchmarks/trainer.py"), *options]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "rounds.json").read_text())["rounds"]
    losses = {way: figures["loss"] for way, figures in found.items()}
    assert losses.pop("alone") > 7
    assert losses == pytest.approx(dict.fromkeys(("ddp", "in-place-2", "shardline-3"), losses["ddp"]), rel=1e-4)
