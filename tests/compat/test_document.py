"""The page says what the tables say, and names tests that there are."""

from __future__ import annotations

from pathlib import Path

from tests.compat.document import UNCHANGED, page

ROOT = Path(__file__).parents[2]


def test_the_page_is_made_from_the_tables():
    assert (ROOT / "docs/migrate-from-deepspeed.md").read_text(encoding="utf-8") == page(), (
        "run: python -m tests.compat.document > docs/migrate-from-deepspeed.md"
    )


def test_every_row_has_a_test():
    for _, _, test in UNCHANGED:
        assert (ROOT / "tests/compat" / test).is_file()
