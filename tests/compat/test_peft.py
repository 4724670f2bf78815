"""PEFT's LoRA under Transformers' Trainer: the same losses, and an adapter that a plain model reads."""

from __future__ import annotations

import pytest

from tests.compat.clients.scripts import needs, run
from tests.compat.rows import unchanged

pytestmark = needs("transformers", "accelerate", "peft")


@unchanged("PEFT 0.21: LoRA under the Trainer", "stages 2 and 3; the adapter is read by a plain model")
def test_lora(tmp_path):
    (plain,) = run("lora.py", tmp_path / "plain", [{"stage": None}])
    for found in run("lora.py", tmp_path / "two", [{"stage": 2}, {"stage": 3}], world=2):
        for name in ("losses", "eval", "saved"):
            assert found[name] == pytest.approx(plain[name], rel=1e-4), name
        assert len(found["saved"]) == 4
