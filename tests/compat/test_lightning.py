"""Lightning's DeepSpeedStrategy, of Fabric and of the Trainer."""

from __future__ import annotations

import pytest

from tests.compat.clients.scripts import needs, run

pytestmark = needs("lightning")


def test_fabric(tmp_path):
    (plain,) = run("fabric.py", tmp_path / "plain", [{"stage": None}])
    for found in run("fabric.py", tmp_path / "two", [{"stage": 2}, {"stage": 3}], world=2):
        assert found["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        assert found["weights"] == pytest.approx(plain["weights"], rel=1e-5)


def test_trainer(tmp_path):
    (plain,) = run("lightning_trainer.py", tmp_path / "plain", [{"stage": None}])
    offload = {"offload_optimizer": {"device": "cpu"}}
    cases = [{"stage": 2}, {"stage": 3}, {"stage": 3, **offload, "offload_param": {"device": "cpu"}}]
    for found in run("lightning_trainer.py", tmp_path / "two", cases, world=2):
        assert found["steps"] == plain["steps"]
        for name in ("losses", "weights", "val"):
            assert found[name] == pytest.approx(plain[name], rel=1e-5), name
