"""TRL's SFT and DPO (with a reference model, an engine without an optimizer): the same losses."""

from __future__ import annotations

import pytest

from tests.compat.clients.scripts import needs, run

pytestmark = needs("transformers", "accelerate", "trl", "datasets")


def test_sft_and_dpo(tmp_path):
    whats = ("sft", "dpo")
    plain = run("preferences.py", tmp_path / "plain", [{"stage": None, "what": what} for what in whats])
    cases = [{"stage": stage, "what": what} for what in whats for stage in (2, 3)]
    for case, found in zip(cases, run("preferences.py", tmp_path / "two", cases, world=2), strict=True):
        assert found["losses"] == pytest.approx(plain[whats.index(case["what"])]["losses"], rel=1e-4), case
