"""The pool lends nothing that is still held, and views lie where they should."""

from __future__ import annotations

import gc
import mmap
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from shardline.plan import Entry, ParamSpec
from shardline.runtime.memory import resident_bytes
from shardline.sharding.buffer import BufferPool, empty, in_storage_order, view

CPU = torch.device("cpu")
LARGE = 1 << 16  # elements; well above what the pool thinks worth keeping


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux only")
@pytest.mark.parametrize("pages", [1.0, 1.3, 4.999, 17.0])
def test_large_buffers_lie_in_large_pages_but_for_their_end(pages: float) -> None:
    size = int(pages * (2 << 20)) // 4
    buffer = empty(size, torch.float32, CPU)
    assert buffer.shape == (size,) and buffer.is_contiguous() and buffer.untyped_storage().nbytes() == 4 * size
    assert buffer.data_ptr() % (2 << 20) == 0
    buffer.fill_(1.0)
    assert dict(huge_areas())[buffer.data_ptr()] == int(pages) * (2 << 20)


def huge_areas() -> list[tuple[int, int]]:
    """(first address, bytes) of the areas of this process for which large pages were asked."""
    found, area = [], (0, 0)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)) is not None:
            start, stop = (int(each, 16) for each in match.groups())
            area = start, stop - start
        elif line.startswith("VmFlags:") and " hg" in line:
            found.append(area)
    return found


def test_small_buffers_and_those_of_inference_mode_are_ordinary_tensors() -> None:
    with torch.inference_mode():
        for numel in (0, 5, 1 << 20):
            buffer = empty(numel, torch.float32, CPU)
            assert buffer.shape == (numel,) and not buffer.is_inference()
    buffer.fill_(1.0).requires_grad_(True).sum().backward()


def test_memory_goes_with_the_last_view() -> None:
    before = resident_bytes()
    view = empty(16 << 20, torch.float32, CPU).fill_(1.0)[7:9]
    assert resident_bytes() - before > 60e6 and view.sum() == 2
    del view
    assert resident_bytes() - before < 4e6


# --- pool -------------------------------------------------------------------------------------------------------------


def test_what_is_given_back_is_lent_again() -> None:
    pool = BufferPool(CPU)
    buffer = pool.borrow(LARGE, torch.float32)
    address = buffer.data_ptr()
    pool.give_back(buffer)
    del buffer
    again = pool.borrow(2 * LARGE - 64, torch.bfloat16)  # another dtype, nearly the same bytes
    assert again.data_ptr() == address and again.shape == (2 * LARGE - 64,) and again.dtype is torch.bfloat16
    assert pool.borrow(LARGE, torch.float32).data_ptr() != address


@pytest.mark.parametrize("keep", ["the buffer", "a view", "autograd"])
def test_what_somebody_holds_is_not_lent(keep: str) -> None:
    pool = BufferPool(CPU)
    buffer = pool.borrow(LARGE, torch.float32).fill_(1.0)
    address = buffer.data_ptr()
    if keep == "autograd":
        weight = torch.ones(LARGE, requires_grad=True)
        held = (weight * buffer).sum()  # saves the buffer
    else:
        held = buffer if keep == "the buffer" else buffer[64:128].view(8, 8)
    pool.give_back(buffer)
    del buffer
    other = pool.borrow(LARGE, torch.float32).fill_(2.0)
    assert other.data_ptr() != address
    if keep == "autograd":
        held.backward()
        assert bool((weight.grad == 1.0).all())
    else:
        assert bool((held == 1.0).all())
    del held, other
    gc.collect()
    if keep == "autograd":
        return
    assert not pool._free, "what is still held leaves the pool: it is freed with its holder"


def test_the_best_fitting_piece_is_lent_and_none_that_is_much_too_large() -> None:
    pool = BufferPool(CPU)
    sizes = (LARGE, 9 * LARGE // 8, 4 * LARGE)
    buffers = {size: pool.borrow(size, torch.float32) for size in sizes}
    places = {size: buffer.data_ptr() for size, buffer in buffers.items()}
    for size in sizes:
        pool.give_back(buffers.pop(size))
    got = pool.borrow(LARGE + 64, torch.float32)
    assert got.data_ptr() == places[9 * LARGE // 8]
    small = pool.borrow(LARGE, torch.float32)
    assert small.data_ptr() == places[LARGE]
    assert pool.borrow(LARGE, torch.float32).data_ptr() != places[4 * LARGE]


def test_two_buffers_in_use_never_overlap() -> None:
    pool, lent = BufferPool(CPU), []
    for turn in range(200):
        if turn % 3 == 2:
            pool.give_back(lent.pop(turn % len(lent)))
        else:
            lent.append(pool.borrow(LARGE + 64 * (turn % 7), torch.float32))
        spans = sorted((b.data_ptr(), b.data_ptr() + b.numel() * 4) for b in lent)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))


def test_buffers_are_no_inference_tensors_and_may_be_empty() -> None:
    pool = BufferPool(CPU)
    with torch.inference_mode():
        first = pool.borrow(LARGE, torch.float32)
        pool.give_back(first)
        del first
        second = pool.borrow(LARGE, torch.float32)
    assert not second.is_inference()
    second.requires_grad_(True)
    assert pool.borrow(0, torch.float32).shape == (0,)


def test_clear_lets_go() -> None:
    pool = BufferPool(CPU)
    buffer = pool.borrow(LARGE, torch.float32)
    pool.give_back(buffer)
    pool.clear()
    assert not pool._free


# --- views ------------------------------------------------------------------------------------------------------------


def test_a_view_has_the_shape_and_strides_of_its_parameter() -> None:
    spec = ParamSpec("w", ("w",), (2, 3, 4), (12, 1, 3), torch.float32, 0)
    flat = torch.arange(200.0)[8:]  # a bucket need not begin its storage
    shown = view(flat, Entry(spec, 64))
    assert shown.shape == (2, 3, 4) and shown.stride() == (12, 1, 3)
    assert sorted(shown.flatten().tolist()) == flat[64:88].tolist()
    shown.zero_()
    assert bool((flat[64:88] == 0).all()) and flat[63] != 0 and flat[88] != 0


def test_elements_come_in_the_order_in_which_the_parameter_stores_them() -> None:
    by_columns = Entry(ParamSpec("w", ("w",), (2, 3), (1, 2), torch.float32, 0), 0)
    value = torch.arange(6.0).view(2, 3)
    assert in_storage_order(value, by_columns).tolist() == [0, 3, 1, 4, 2, 5] == value.t().flatten().tolist()
    stored = torch.empty(6).as_strided((2, 3), (1, 2)).copy_(value)
    assert in_storage_order(stored, by_columns).data_ptr() == stored.data_ptr()
