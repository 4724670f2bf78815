"""The arithmetic of splitting: pieces cover a global batch once, evenly, at any number of ranks and micro-steps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardline.data.split import Position, Split, span

counts = st.integers(min_value=1, max_value=300)
small = st.integers(min_value=1, max_value=9)


@given(count=st.integers(min_value=0, max_value=300), parts=counts)
def test_spans_cover_in_order_and_differ_by_at_most_one(count: int, parts: int) -> None:
    spans = [span(count, parts, part) for part in range(parts)]
    assert [place for one in spans for place in one] == list(range(count))
    sizes = [len(one) for one in spans]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@given(count=counts, accumulation=small, world_size=small)
def test_pieces_of_all_ranks_and_micro_steps_are_the_global_batch(
    count: int, accumulation: int, world_size: int
) -> None:
    pieces = [
        Split(count, accumulation, world_size, rank).piece(count, micro)
        for micro in range(accumulation)
        for rank in range(world_size)
    ]
    assert [place for piece in pieces if piece.samples for place in piece.places] == list(range(count))
    assert all(len(piece.places) == max(piece.samples, 1) for piece in pieces)  # never an empty micro-batch
    assert all(0 <= place < count for piece in pieces for place in piece.places)
    assert max(piece.samples for piece in pieces) == Split(count, accumulation, world_size, 0).largest


@given(length=st.integers(min_value=0, max_value=500), global_batch=counts)
def test_batches_of_an_epoch_count_like_cutting_a_list(length: int, global_batch: int) -> None:
    cut = [range(length)[start : start + global_batch] for start in range(0, length, global_batch)]
    split = Split(global_batch, 1, 1, 0)
    assert split.batches(length, drop_last=False) == len(cut)
    assert split.batches(length, drop_last=True) == sum(len(batch) == global_batch for batch in cut)


@given(accumulation=small, steps=st.integers(min_value=0, max_value=60))
def test_position_counts_micro_steps_in_windows(accumulation: int, steps: int) -> None:
    position = Position(epoch=3)
    for _ in range(steps):
        position = position.following(accumulation)
    assert position == Position(3, *divmod(steps, accumulation))
