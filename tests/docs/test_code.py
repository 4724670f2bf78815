"""The code of the tutorials, on one rank and on two, and of other short pages, on warm processes."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from tests.docs.test_pages import PAGES, WARM, blocks

CASES = [
    (page, world)
    for page in PAGES
    if page.startswith(WARM) and blocks(page)
    for world in ((1, 2) if page.startswith("docs/tutorials/") else (1,))
]


NEEDS = {"docs/tutorials/tensorboard.md": "tensorboard", "docs/tutorials/wandb.md": "wandb"}
"""Packages that are not among the pinned ones."""


def run_page(page: str) -> int:
    """On a rank: run a page's blocks in order as one script; how many there were."""
    names: dict[str, object] = {"__name__": "__main__"}
    random = torch.get_rng_state()
    code = blocks(page)
    try:
        for block in code:
            exec(compile(block, page, "exec"), names)
    finally:
        torch.set_rng_state(random)
        if (engine := names.get("engine")) is not None:
            engine.destroy()  # type: ignore[attr-defined]
    return len(code)


@pytest.mark.parametrize(("page", "world"), CASES)
def test_the_code_of_a_page_runs(page, world, ranks):
    if page in NEEDS and find_spec(NEEDS[page]) is None:
        pytest.skip(f"needs the package {NEEDS[page]}")
    assert all(count > 0 for count in ranks(run_page, world, page))
