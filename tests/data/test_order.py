"""The order of an epoch: a permutation from (seed, epoch), the dataset's own, or a sampler's."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import RandomSampler, WeightedRandomSampler

from shardline.data.order import SampleOrder, permutation
from shardline.errors import DataError


@settings(deadline=None)
@given(length=st.integers(1, 200), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_permutation_holds_every_index_once(length: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(length, seed, epoch).tolist()) == list(range(length))


def test_permutation_changes_with_seed_and_epoch_only() -> None:
    first = permutation(100, 1, 0)
    torch.rand(3)
    assert torch.equal(first, permutation(100, 1, 0))
    assert not torch.equal(first, permutation(100, 1, 1))
    assert not torch.equal(first, permutation(100, 2, 0))


def test_without_shuffle_the_order_is_the_datasets() -> None:
    order = SampleOrder("abcde", None, seed=1, shuffle=False)
    assert order.indices(0).tolist() == order.indices(5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("make", [lambda: RandomSampler(range(50)), lambda: WeightedRandomSampler([1.0] * 50, 50)])
def test_a_random_sampler_gives_every_rank_the_same_order(make) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(1)
    here = SampleOrder(range(50), make(), seed=3, shuffle=True)
    first = [here.indices(epoch).tolist() for epoch in range(2)]
    torch.manual_seed(2)  # another rank, resumed in epoch 1
    there = SampleOrder(range(50), make(), seed=3, shuffle=True)
    assert there.indices(1).tolist() == first[1] != first[0]


class ByEpoch:
    def __init__(self) -> None:
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([self.epoch, self.epoch + 1])


def test_a_sampler_is_told_the_epoch_and_leaves_outer_states_alone() -> None:
    state = random.getstate()
    assert SampleOrder(range(50), ByEpoch(), seed=0, shuffle=True).indices(4).tolist() == [4, 5]
    assert random.getstate() == state


def test_a_sampler_of_batches_is_refused() -> None:
    with pytest.raises(DataError, match="one integer per sample"):
        SampleOrder(range(50), [[0, 1], [2, 3]], seed=0, shuffle=True).indices(0)  # type: ignore[list-item]


def test_digest_tells_orders_apart() -> None:
    shuffled, plain = (SampleOrder(range(30), None, seed=1, shuffle=shuffle) for shuffle in (True, False))
    assert shuffled.digest(0) != plain.digest(0)
    assert shuffled.digest(0) != shuffled.digest(1)
    assert shuffled.digest(2) == SampleOrder(range(30), None, seed=1, shuffle=True).digest(2)
