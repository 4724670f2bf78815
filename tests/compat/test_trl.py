"""TRL's SFT, DPO (with a reference model, an engine without an optimizer) and GRPO, which generates as it trains."""

from __future__ import annotations

import pytest

from tests.compat.clients.scripts import needs, run
from tests.compat.rows import unchanged

pytestmark = needs("transformers", "accelerate", "trl", "datasets")


@unchanged("TRL 1.16: `SFTTrainer`, `DPOTrainer`, `GRPOTrainer`", "stages 2 and 3; DPO with a reference model")
def test_sft_and_dpo(tmp_path):
    whats = ("sft", "dpo")
    plain = run("preferences.py", tmp_path / "plain", [{"stage": None, "what": what} for what in whats])
    cases = [{"stage": stage, "what": what} for what in whats for stage in (2, 3)]
    for case, found in zip(cases, run("preferences.py", tmp_path / "two", cases, world=2), strict=True):
        assert found["losses"] == pytest.approx(plain[whats.index(case["what"])]["losses"], rel=1e-4), case


@unchanged("TRL 1.16: `SFTTrainer`, `DPOTrainer`, `GRPOTrainer`", "GRPO without one, at stages 0, 2, 3")
def test_grpo(tmp_path):
    """What is generated depends on each rank's random numbers, so stages are compared with each other."""
    cases = [{"stage": stage, "what": "grpo"} for stage in (0, 2, 3)]
    first, *others = run("preferences.py", tmp_path, cases, world=2)
    assert any(first["rewards"])
    assert any(first["norms"])
    for each in others:
        assert each["rewards"] == pytest.approx(first["rewards"])
        assert each["norms"] == pytest.approx(first["norms"], rel=1e-3, abs=1e-5)
