"""The benchmark of sinks: what it counts and how it takes ratios. No times."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_it_runs_and_writes_its_table_between_the_markers(tmp_path):
    text = (BENCHMARKS.parent / "docs" / "performance.md").read_text()
    report = tmp_path / "report.md"
    report.write_text(text)
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "observing.py", "--rounds=2", "--steps=1", "--width=16", "--write", report],
        capture_output=True, text=True, timeout=200, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = done.stdout
    assert "2 rounds of 1 steps" in table and "run_log, ns of the processor" in table
    assert "| events, writes to the system | 2.0, " in table, "StepDone and PhaseTimes"
    head, _, rest = text.partition("<!-- figures: python benchmarks/observing.py --write -->\n")
    assert report.read_text() == head + "<!-- figures: python benchmarks/observing.py --write -->\n" + table + (
        "<!-- /figures -->" + rest.partition("<!-- /figures -->")[2]
    )


def test_a_spread_is_that_of_the_order_of_ratios(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("SHARDLINE_DEVICE", "cpu")
    from observing import Spread

    found = Spread.of([1 + n / 100 for n in reversed(range(101))])
    assert found.median == 1.5 and found.half == pytest.approx((1.245, 1.755))
    # Of 101 values the 41st to the 61st hold the median of their source in 95 of 100 cases.
    assert found.between == pytest.approx((1.4, 1.61), abs=0.011)
