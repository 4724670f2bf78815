"""Frozen weights that stand still under edits: known from a sample, said once."""

from __future__ import annotations

import pytest
import torch

from shardline.sharding.rounding import RoundingWatch


def follow(decay, dtype, edits, certain=True, apart=0.01):
    student = torch.randn(300, generator=torch.Generator().manual_seed(0))
    teacher = (student * (1 + apart * torch.rand(300, generator=torch.Generator().manual_seed(1)))).to(dtype)
    watch = RoundingWatch()
    said = []
    for _ in range(edits):
        teacher.mul_(decay).add_(student, alpha=1 - decay)
        said.append(watch.edited(teacher, certain=certain))
    return said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_average_that_rounding_holds_back_is_told_at_its_time_and_once(dtype) -> None:
    said = follow(0.9999, dtype, 200)
    assert said.count(True) == 1 and said.index(True) == 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_that_moves_is_not(dtype) -> None:
    assert not any(follow(0.9 if dtype is torch.bfloat16 else 0.9999, dtype, 200, apart=1.0))


def test_what_was_perhaps_only_read_is_not_if_nothing_of_it_moved() -> None:
    watch, still = RoundingWatch(), torch.ones(10, dtype=torch.bfloat16)
    assert not any(watch.edited(still, certain=False) for _ in range(100))
    assert any(follow(0.995, torch.bfloat16, 100, certain=False, apart=0.6)), "some elements moved, so it was edited"
