"""What is packed as a place in a bucket, and what comes back. With a model: ``test_hooks.py``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardline.sharding.buffer import BufferPool
from shardline.sharding.saved_tensors import SavedTensors, SavedWeight


def one_unit() -> tuple[SavedTensors, Any, Tensor, list[Any]]:
    """A unit of one bucket, whose parameters of 8 and 4 elements begin at 0 and 64; its buffer; units brought here."""
    pool = BufferPool(torch.device("cpu"))
    full = pool.borrow(128, torch.float32).copy_(torch.arange(128.0))
    entries = [SimpleNamespace(offset=at, param=SimpleNamespace(name=name)) for at, name in ((0, "a"), (64, "b"))]
    bucket = SimpleNamespace(
        plan=SimpleNamespace(dtype=torch.float32, entries=entries),
        params=[nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(4))],
        weights=SimpleNamespace(full=full, generation=1),
    )
    unit = SimpleNamespace(name="u", sharded=True, pool=pool, buckets=[bucket])
    pool.label(full, (unit, bucket))
    brought: list[Any] = []
    return SavedTensors([unit], brought.append), bucket, full, brought  # type: ignore[list-item]


def test_what_lies_in_a_units_weights_is_a_place() -> None:
    saved, bucket, full, brought = one_unit()
    assert saved.push()
    try:
        assert not saved.push(), "once is enough"
        place = saved.pack(full[64:68].view(2, 2).t())
        other = torch.ones(3)
        assert saved.pack(other) is other
    finally:
        saved.pop()
    assert isinstance(place, SavedWeight) and (place.name, place.offset, place.stride) == ("b", 64, (1, 2))
    bucket.weights.full = full.clone()  # gathered again, elsewhere
    assert torch.equal(saved.unpack(place), full[64:68].view(2, 2).t())
    assert [unit.name for unit in brought] == ["u"]
    assert saved.unpack(other) is other


def test_a_label_that_is_older_than_the_buffer_means_nothing() -> None:
    """The memory that the label names is not that of the weights any more."""
    saved, bucket, full, _ = one_unit()
    bucket.weights.full = torch.zeros(128)
    assert saved.push()
    try:
        part = full[:8]
        assert saved.pack(part) is part
    finally:
        saved.pop()


@pytest.mark.parametrize("change", ["generation", "version"])
def test_weights_that_changed_meanwhile_are_refused(change: str) -> None:
    saved, bucket, full, brought = one_unit()
    assert saved.push()
    try:
        place = saved.pack(full[:8])
    finally:
        saved.pop()
    if change == "generation":
        bucket.weights.generation += 1
    else:
        with torch.no_grad():
            bucket.params[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation: parameter 'a'"):
        saved.unpack(place)
    assert not brought


def test_without_sharded_units_nothing_is_pushed() -> None:
    assert not SavedTensors([SimpleNamespace(sharded=False, pool=None)], lambda unit: None).push()  # type: ignore[list-item]


def test_hooks_of_the_users_see_what_is_none_of_the_weights() -> None:
    saved, _, full, _ = one_unit()
    other = torch.ones(3)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: ("packed", tensor), lambda found: found[1] + 1):
        assert saved.push()
        try:
            packed = saved.pack(other)
            assert isinstance(saved.pack(full[:8]), SavedWeight)
        finally:
            saved.pop()
    assert torch.equal(saved.unpack(packed), other + 1)
