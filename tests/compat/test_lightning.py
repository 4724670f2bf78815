"""Lightning Fabric's DeepSpeedStrategy: set up, trained by ``optimizer.step()``, saved and loaded."""

from __future__ import annotations

import pytest

from tests.compat.clients.scripts import needs, run

pytestmark = needs("lightning")


def test_fabric(tmp_path):
    (plain,) = run("fabric.py", tmp_path / "plain", [{"stage": None}])
    for found in run("fabric.py", tmp_path / "two", [{"stage": 2}, {"stage": 3}], world=2):
        assert found["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        assert found["weights"] == pytest.approx(plain["weights"], rel=1e-5)
