"""A checkpoint of any stage, precision and number of ranks loads at any other, directly and bit by bit."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoint import cases
from tests.harness import full

STAGES = (0, 1, 2, 3)
WORLDS = (1, 2, 3, 4)


def assert_same(results, wanted, *, weights=True, state=True):
    for result in results:
        assert result["counters"] == wanted[0]["counters"]
        assert result["lr"] == wanted[0]["lr"]
        assert result["loader"] == wanted[0]["loader"]
        assert result["scalars"].items() <= {k: v for each in wanted for k, v in each["scalars"].items()}.items()
        if weights:
            for name, value in wanted[0]["weights"].items():
                if not name.startswith("norm."):  # statistics are each rank's own
                    ours = result["weights"][name]  # frozen weights have no masters, and the compute dtype
                    assert torch.equal(ours, value.to(ours.dtype)), name
    if state:
        ours, theirs = cases.whole(results), cases.whole(wanted)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def check(ranks, tmp_path, sources, targets, dtype="fp32", onto="fp32"):
    written = {
        (stage, world): ranks(
            cases.save_after, world, str(tmp_path / f"{stage}-{world}"), cases.config(stage, world, dtype), 3
        )
        for stage, world in sources
    }
    for world in sorted({world for _, world in targets}):
        stages = [stage for stage, each in targets if each == world]
        paths = [str(tmp_path / f"{stage}-{world}") for stage, world in written]
        everyone = ranks(
            cases.load_each, world, paths, [cases.config(stage, world, onto) for stage in stages], timeout=300
        )
        found = iter(zip(*everyone, strict=True))
        for source in written:
            for stage in stages:
                try:
                    assert_same(next(found), written[source])
                except AssertionError as error:
                    raise AssertionError(f"stage, ranks {source} to {(stage, world)}: {error}") from error


def test_a_few_layouts_to_each_other(ranks, tmp_path):
    some = [(0, 1), (1, 3), (2, 2), (3, 2), (3, 4)]
    check(ranks, tmp_path, some, some)


@full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_layout_to_every_other(ranks, tmp_path, dtype):
    every = [(stage, world) for stage in STAGES for world in WORLDS]
    check(ranks, tmp_path, every, every, dtype, dtype)


@pytest.mark.parametrize(("dtype", "onto"), [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "bf16"), ("bf16", "bf16")])
def test_precisions_go_into_each_other_by_the_masters(ranks, tmp_path, dtype, onto):
    check(ranks, tmp_path, [(1, 2)], [(3, 2), (0, 1)], dtype, onto)
