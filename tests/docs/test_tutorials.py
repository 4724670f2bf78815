"""The tutorials: their code runs, on one rank and on two, and what they assert holds on each."""

from __future__ import annotations

import pytest
import torch

from tests.docs.test_pages import ROOT, blocks

TUTORIALS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/tutorials/*.md"))


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


@pytest.mark.parametrize("page", TUTORIALS)
@pytest.mark.parametrize("world", [1, 2])
def test_a_tutorial_runs(page, world, ranks):
    assert all(count > 0 for count in ranks(run_page, world, page))
