"""The run after a resume is the run without one: bit by bit on the same layout, sample for sample on another."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoint import cases
from tests.harness import full

STEPS = 20


def check(ranks, tmp_path, settings, at, world=2, **options):
    """Train 20 steps saving after ``at`` micro-steps; then again from there."""
    path = str(tmp_path / "saved")
    straight = ranks(cases.resume, world, None, settings, STEPS, (at, path), **options)
    resumed = ranks(cases.resume, world, path, settings, STEPS)
    accumulation = settings["gradient_accumulation_steps"]
    first = at // accumulation * accumulation
    for rank, ((told, state), (again, state_again)) in enumerate(zip(straight, resumed, strict=True)):
        for what, was, now in zip(("losses", "samples", "random numbers"), told, again, strict=True):
            assert now == was[first:], f"{what} differ on rank {rank}"
        assert list(state["weights"]) == list(state_again["weights"])
        for name, value in state["weights"].items():  # BatchNorm's statistics of each rank among them
            assert torch.equal(value, state_again["weights"][name]), f"{name} differs on rank {rank}"
        for key in ("counters", "lr", "scale", "loader", "scalars"):
            assert state[key] == state_again[key], f"{key} differs on rank {rank}"
        for (*where, value), (*where_again, value_again) in zip(state["pieces"], state_again["pieces"], strict=True):
            assert where == where_again and torch.equal(value, value_again)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_in_the_middle_of_an_epoch_and_of_a_window(ranks, tmp_path, stage):
    """50 samples in global batches of 12 (the last one of 2) of 2 micro-steps; saved after 7 steps and a half."""
    check(ranks, tmp_path, cases.config(stage, 2, accumulation=2), at=15)


@pytest.mark.parametrize(("stage", "dtype"), [(3, "bf16"), (1, "fp16")])
def test_in_low_precision(ranks, tmp_path, stage, dtype):
    check(ranks, tmp_path, cases.config(stage, 2, dtype, accumulation=2), at=15)


def test_with_workers(ranks, tmp_path):
    """What workers have prefetched is not what was trained on."""
    check(ranks, tmp_path, cases.config(2, 2, accumulation=2, workers=2), at=15)


def test_at_a_boundary_and_in_the_background(ranks, tmp_path):
    check(ranks, tmp_path, cases.config(3, 2, accumulation=2), at=16, async_save=True)


@full
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("at", [0, 15, 16])
def test_everywhere(ranks, tmp_path, stage, world, dtype, at):
    check(ranks, tmp_path, cases.config(stage, world, dtype, accumulation=2), at, world)


def rows(results):
    """The samples of each global batch over all ranks; a window has 2 micro-steps."""
    per_rank = [told[1] for told, _ in results]
    return [
        sorted(index for samples in per_rank for index in samples[step] + samples[step + 1])
        for step in range(0, len(per_rank[0]), 2)
    ]


@pytest.mark.parametrize(("stage", "onto"), [(3, 1), (2, 3)])
def test_at_another_world_size_no_sample_is_lost_or_repeated(ranks, tmp_path, stage, onto):
    path = str(tmp_path / "saved")
    straight = ranks(cases.resume, 2, None, cases.config(stage, 2, accumulation=2), 10, (9, path))
    resumed = ranks(cases.resume, onto, path, cases.config(stage, onto, accumulation=2), 10)
    assert rows(resumed) == rows(straight)[4:]
    assert sorted(index for batch in rows(straight)[:5] for index in batch) == list(range(50))


@pytest.mark.parametrize("onto", [1, 3])
def test_at_another_world_size_the_weights_agree_to_the_tolerance_of_the_reduction(ranks, tmp_path, onto):
    """Without dropout and statistics, which are each rank's own."""
    path = str(tmp_path / "saved")
    settings = [cases.config(2, world, accumulation=2) for world in (2, onto)]
    straight = ranks(cases.resume, 2, None, settings[0], 10, (8, path), dropout=False)
    resumed = ranks(cases.resume, onto, path, settings[1], 10, dropout=False)
    weights, again = straight[0][1]["weights"], resumed[0][1]["weights"]
    for name, value in weights.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-5)
    assert mean_losses(resumed) == pytest.approx(mean_losses(straight)[4:], rel=1e-4)


def mean_losses(results):
    """Of each global batch over all its samples."""
    found = []
    for step in range(0, len(results[0][0][0]), 2):
        parts = [(told[0][i], len(told[1][i])) for told, _ in results for i in (step, step + 1)]
        found.append(sum(loss * size for loss, size in parts if size) / sum(size for _, size in parts))
    return found
