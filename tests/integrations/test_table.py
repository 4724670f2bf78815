"""The table of docs/integrations.md says what a training of each of its cells has shown."""

from __future__ import annotations

import pytest

from tests.integrations import table
from tests.integrations.clients import needs

pytestmark = needs("transformers", "accelerate", "lightning", "peft", "trl", "datasets")


@pytest.mark.parametrize("client", table.CLIENTS)
def test_a_row_is_what_was_found(ranks, client) -> None:
    said: list[str] = []
    assert table.row(ranks, client, said.append) in table.written(), (
        "run: .venv-integrations/bin/python -m tests.integrations.table",
        said,
    )


def test_the_table_is_complete() -> None:
    assert table.written().startswith(table.head())
    assert table.written().count("\n") == len(table.CLIENTS) + 2
