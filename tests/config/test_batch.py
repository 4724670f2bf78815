import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardline.config.batch import KEYS, UNEVEN, BatchError, solve, solve_changing

sizes = st.integers(1, 64)
worlds = st.integers(1, 16)


@given(sizes, sizes, worlds, st.sampled_from(range(3)))
def test_two_sizes_give_the_third(micro, accumulation, world, left_out):
    given_sizes = [micro * accumulation * world, micro, accumulation]
    expected = tuple(given_sizes)
    given_sizes[left_out] = None
    solved = solve(*given_sizes, world)
    assert (solved.train, solved.micro, solved.accumulation) == expected
    assert list(solved.origins) == [KEYS[left_out]]


@given(sizes, worlds)
def test_one_size_stands_with_accumulation_one(micro, world):
    for solved in (solve(micro * world, None, None, world), solve(None, micro, None, world)):
        assert (solved.train, solved.micro, solved.accumulation) == (micro * world, micro, 1)


@given(st.integers(1, 200), st.none() | sizes, st.none() | sizes, worlds, st.booleans())
def test_whatever_is_given_is_kept_or_refused(train, micro, accumulation, world, uneven):
    try:
        solved = solve(train, micro, accumulation, world, uneven)
    except BatchError:
        product = (micro or 1) * (accumulation or 1) * world
        assert train % product or train != product, "refused although it fits"
        return
    assert solved.train == train
    assert micro in (None, solved.micro) or (uneven and accumulation is None and solved.micro < micro)
    assert accumulation in (None, solved.accumulation)
    pieces = solved.accumulation * world
    assert solved.micro == math.ceil(train / pieces)
    assert uneven or train == solved.micro * pieces


@given(st.integers(1, 200), st.none() | sizes, st.none() | sizes, worlds, st.booleans())
def test_each_fix_that_an_error_names_works(train, micro, accumulation, world, uneven):
    try:
        solve(train, micro, accumulation, world, uneven)
    except BatchError as error:
        fixes = str(error).partition("; ")[2]
        named = {key: re.search(rf"\b{key} (\d+)(?: or (\d+))?", fixes) for key in KEYS}
        assert any(named.values()), error
        for index, key in enumerate(KEYS):
            for number in named[key].groups() if named[key] else ():
                if number is not None:
                    sizes = [train, micro, accumulation]
                    sizes[index] = int(number)
                    solve(*sizes, world, uneven)
        for key, rest in zip(KEYS, ([None, micro, accumulation], [train, None, accumulation]), strict=False):
            if f"leave {key} out" in fixes:
                solve(*rest, world, uneven)
        if "data_loader.uneven: true" in fixes and micro is None:
            solve(train, micro, accumulation, world, uneven=True)


def test_the_error_names_neighbours():
    with pytest.raises(
        BatchError, match=r"^train_batch_size 12 is not divisible by world 8 x accumulation 1 = 8; "
    ) as e:
        solve(12, None, None, 8)
    assert "train_batch_size 8 or 16 would be, or set data_loader.uneven: true" in str(e.value)
    with pytest.raises(BatchError, match="train_batch_size 8 would be"):
        solve(3, None, None, 8)
    with pytest.raises(
        BatchError, match=r"train_batch_size 64 or train_micro_batch_size_per_gpu 1 or grad.* 2 would fit"
    ):
        solve(32, 2, 4, 8)


@pytest.mark.parametrize("accumulation", [None, 3])
def test_no_size_at_all(accumulation):
    with pytest.raises(BatchError, match=f"per_gpu 1 is train_batch_size {4 * (accumulation or 1)}"):
        solve(None, None, accumulation, 4)


def test_uneven_rounds_up():
    solved = solve(101, None, 2, 8, uneven=True)
    assert (solved.train, solved.micro, solved.accumulation) == (101, 7, 2)
    assert "rounded up" in solved.origins["train_micro_batch_size_per_gpu"]
    assert solve(12, 2, None, 8, uneven=True).accumulation == 1
    assert (solve(12, 3, None, 3, uneven=True).accumulation, solve(12, 3, None, 3, uneven=True).micro) == (2, 2)


@given(st.integers(1, 200), st.none() | sizes, st.none() | sizes, worlds)
def test_where_nodes_come_and_go_any_number_of_ranks_takes_the_same_batch(train, micro, accumulation, world):
    solved = solve_changing(train, micro, accumulation, world, None)
    pieces = solved.accumulation * world
    assert (solved.train, solved.micro) == (train, math.ceil(train / pieces))
    assert solved.micro <= (micro or train)  # what is in memory at once
    assert (UNEVEN in solved.origins) == (train % pieces != 0)
    assert solved.accumulation == accumulation or micro or accumulation is None
    try:
        usual = solve(train, micro, accumulation, world)
    except BatchError:
        with pytest.raises(BatchError):
            solve_changing(train, micro, accumulation, world, False)
    else:
        assert (usual.micro, usual.accumulation) == (solved.micro, solved.accumulation)


def test_where_nodes_come_and_go_the_global_batch_is_given():
    with pytest.raises(BatchError, match=r"nodes may come and go, so train_batch_size must be given.*it would be 12\."):
        solve_changing(None, 2, 3, 2, None)
