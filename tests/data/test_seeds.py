"""Seeds are spread and never change; states outside come back."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from shardline.data.seeds import derive, outer_states_kept, seed_all


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(())), float(torch.randn(()))]


def test_derived_seeds_are_fixed_and_distinct() -> None:
    assert derive(1234, 0, 7) == 14188683354208418919  # b2sum -l 64; resumed runs depend on it
    seeds = {derive(seed, epoch, index) for seed in range(3) for epoch in range(10) for index in range(1000)}
    assert len(seeds) == 30_000
    assert derive(1, 23) != derive(12, 3)


def test_seeding_decides_all_three_generators() -> None:
    with outer_states_kept():
        seed_all(2**64 - 1)
        first = draws()
        seed_all(5)
        assert all(a != b for a, b in zip(first, draws(), strict=True))
        seed_all(2**64 - 1)
        assert draws() == first


def test_outer_states_come_back_after_an_error_too() -> None:
    with outer_states_kept():
        seed_all(1)
        expected = draws()
        seed_all(1)
        with pytest.raises(KeyError), outer_states_kept():
            seed_all(2)
            draws()
            raise KeyError
        assert draws() == expected
