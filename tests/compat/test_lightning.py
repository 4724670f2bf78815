"""Lightning's DeepSpeedStrategy, of Fabric and of the Trainer."""

from __future__ import annotations

import pytest

from tests.compat.clients.scripts import needs, run
from tests.compat.rows import unchanged

pytestmark = needs("lightning")


@unchanged(
    "Lightning Fabric 2.6: `DeepSpeedStrategy`",
    "stages 2 and 3; `init_module`, `setup`, `optimizer.step()`, `save`, `load`",
)
def test_fabric(tmp_path):
    (plain,) = run("fabric.py", tmp_path / "plain", [{"stage": None}])
    for found in run("fabric.py", tmp_path / "two", [{"stage": 2}, {"stage": 3}], world=2):
        assert found["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        assert found["weights"] == pytest.approx(plain["weights"], rel=1e-5)


@unchanged(
    "Lightning's Trainer 2.6: `DeepSpeedStrategy`",
    "stages 2, 3 and 3 with offload; accumulation, clipping, validation, checkpoints; resumed at another stage",
)
def test_trainer(tmp_path):
    (plain,) = run("lightning_trainer.py", tmp_path / "plain", [{"stage": None}])
    offload = {"offload_optimizer": {"device": "cpu"}}
    cases = [{"stage": 2}, {"stage": 3}, {"stage": 3, **offload, "offload_param": {"device": "cpu"}}]
    cases += [{"stage": 2, "resume_from": 1}, {"stage": 3, "resume_from": 0}]
    *whole, after_two, after_three = run("lightning_trainer.py", tmp_path / "two", cases, world=2)
    for found in whole:
        assert found["steps"] == plain["steps"]
        for name in ("losses", "weights", "val"):
            assert found[name] == pytest.approx(plain[name], rel=1e-5), name
    for found in (after_two, after_three):  # the second epoch, at another stage than the first
        assert found["steps"] == plain["steps"]
        assert found["losses"] == pytest.approx(plain["losses"][4:], rel=1e-5)
        for name in ("weights", "val"):
            assert found[name] == pytest.approx(plain[name], rel=1e-5), name
