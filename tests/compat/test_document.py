"""The page says what the tables say, and names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

from tests.compat.document import DIFFERENCES, UNCHANGED, page

ROOT = Path(__file__).parents[2]


def test_the_page_is_made_from_the_tables():
    assert (ROOT / "docs/migrate-from-deepspeed.md").read_text(encoding="utf-8") == page(), (
        "run: python -m tests.compat.document > docs/migrate-from-deepspeed.md"
    )


def test_each_test_of_a_client_and_each_difference_is_a_row():
    """Rows stand at tests, so a row without one cannot be; here, that no test of a client is without a row."""
    named = {row.test for row in (*UNCHANGED, *DIFFERENCES)}
    for file in ("accelerate", "differences", "lightning", "parity", "peft", "scripts", "transformers", "trl"):
        text = (ROOT / f"tests/compat/test_{file}.py").read_text(encoding="utf-8")
        for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE):
            assert f"test_{file}.py::{name}" in named
