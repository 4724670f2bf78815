"""The code of the tutorials, on one rank and on two, and of other short pages, on warm processes."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from tests.docs.test_pages import PAGES, WARM, blocks, run

TENSORBOARD, WANDB = "docs/tutorials/tensorboard.md", "docs/tutorials/wandb.md"

CASES = [
    (page, world)
    for page in PAGES
    if page.startswith(WARM) and blocks(page) and page != WANDB
    for world in ((1, 2) if page.startswith("docs/tutorials/") else (1,))
]


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
    if page == TENSORBOARD and find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    assert all(count > 0 for count in ranks(run_page, world, page))


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_the_code_of_the_page_of_wandb_runs(tmp_path):
    run("\n".join(blocks(WANDB)), tmp_path)  # in a process of its own: threads of wandb's end with it
