"""Published training scripts, plain and in place: the same losses and weights, with a line or two changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.in_place import scripts
from tests.in_place.loops import assert_same, averaged, sharded

NAMES = [script.__name__ for script in scripts.WHAT]
STAGES = (0, 2, 3)
PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"


def run(name, stages):
    script = getattr(scripts, name)
    return [script(averaged), *(script(sharded(stage)) for stage in stages)]


@pytest.mark.parametrize("name", NAMES)
def test_a_script_runs_in_place(ranks, name):
    for want, *found in ranks(run, 2, name, STAGES):
        for stage, got in zip(STAGES, found, strict=True):
            assert_same(got, want, 2e-5, f"{name} at stage {stage}")


def in_bf16(name, stages):
    """In bf16 by the configuration where the script allows it, and under autocast; the plain one likewise."""
    script = getattr(scripts, name)
    found = [] if script in scripts.BY_METHODS else [script(sharded(stage, bf16={"enabled": True})) for stage in stages]
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):  # its cache would outlive a step
        plain = script(averaged)
        found += [script(sharded(stage)) for stage in stages]
    return plain, found


@pytest.mark.parametrize("name", NAMES)
def test_a_script_trains_in_bf16(ranks, name):
    for want, found in ranks(in_bf16, 2, name, (0, 3)):
        for got in found:
            assert_same(got, want, 3e-2, name)


def test_the_table_of_the_page_counts_lines_of_the_scripts():
    assert scripts.table() in PAGE.read_text(encoding="utf-8"), scripts.table()
