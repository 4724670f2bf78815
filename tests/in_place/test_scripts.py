"""Published training scripts, plain and in place: the same losses and weights, with a line or two changed."""

from __future__ import annotations

import pytest

from tests.in_place import scripts
from tests.in_place.loops import assert_same, averaged, sharded

NAMES = [script.__name__ for script in scripts.LINES]


def run(name, stages):
    script = getattr(scripts, name)
    return [script(averaged), *(script(sharded(stage)) for stage in stages)]


@pytest.mark.parametrize("name", NAMES)
def test_a_script_runs_in_place(ranks, name):
    for want, *found in ranks(run, 2, name, (0, 2, 3)):
        for stage, got in zip((0, 2, 3), found, strict=True):
            assert_same(got, want, 2e-5, f"{name} at stage {stage}")
