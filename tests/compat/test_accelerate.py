"""Accelerate's DeepSpeedPlugin: a loop with ``accumulate``, clipping, a schedule, states saved and loaded."""

from __future__ import annotations

import pytest

from tests.compat.clients.scripts import needs, run

pytestmark = needs("accelerate")


def test_a_loop(tmp_path):
    (plain,) = run("accelerate_loop.py", tmp_path / "plain", [{"stage": None}])
    cases = [{"stage": 0}, {"stage": 2}, {"stage": 3}, {"stage": 3, "resume_at": 1}]
    for found in run("accelerate_loop.py", tmp_path / "two", cases, world=2):
        for name in ("losses", "norms", "weights"):
            assert found[name] == pytest.approx(plain[name], rel=1e-5), name
