"""Accelerate's DeepSpeedPlugin: a loop with ``accumulate``, clipping, a schedule, states saved and loaded."""

from __future__ import annotations

import pytest

from tests.compat.clients.scripts import needs, run
from tests.compat.rows import unchanged

pytestmark = needs("accelerate")


@unchanged(
    "Accelerate 1.15: `DeepSpeedPlugin`",
    "`prepare`, `accumulate`, `clip_grad_norm_`, a torch schedule, `save_state`, `load_state`, `get_state_dict`, "
    "`unwrap_model`; stages 0, 2, 3",
)
def test_a_loop(tmp_path):
    (plain,) = run("accelerate_loop.py", tmp_path / "plain", [{"stage": None}])
    cases = [{"stage": 0}, {"stage": 2}, {"stage": 3}, {"stage": 3, "resume_at": 1}]
    for found in run("accelerate_loop.py", tmp_path / "two", cases, world=2):
        for name in ("losses", "norms", "weights"):
            assert found[name] == pytest.approx(plain[name], rel=1e-5), name
