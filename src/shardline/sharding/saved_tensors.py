"""What autograd saves of sharded weights: a place in a bucket instead of the memory, looked up after a gather.

``saved_tensors_hooks`` of torch's, pushed around the outermost module calls and ``gathered_parameters()``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardline.runtime.modes import leave_modes
from shardline.sharding.bucket import Bucket
from shardline.sharding.parameter import has_own_attributes
from shardline.sharding.unit import Unit

__all__ = ["SavedTensors", "SavedWeight"]


@dataclass(frozen=True)
class SavedWeight:
    """A saved tensor as a place in a bucket: autograd holds this instead of the memory.

    Attributes:
        is_param: whether it is ``param`` itself, frozen, and tells more than its elements.
    """

    unit: Unit
    bucket: Bucket
    generation: int
    param: nn.Parameter
    version: int
    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    is_param: bool


@dataclass(frozen=True)
class _Foreign:
    """A tensor that hooks outside of ours packed, and how they unpack it."""

    unpack: Callable[[Any], Tensor]
    packed: Any


class SavedTensors:
    """The saved-tensor hooks of one engine.

    Args:
        units: all of the engine's; where none is sharded, nothing is ever pushed.
        pre_backward: brings the full weights of a unit here.

    Attributes:
        needed: whether any unit is sharded.
    """

    def __init__(self, units: Sequence[Unit], pre_backward: Callable[[Unit], None]) -> None:
        self.needed = any(unit.sharded for unit in units)
        self._pool = units[0].pool if units else None
        self._pre_backward = torch.compiler.disable(pre_backward)  # see untraced; without a call on the stack
        self._outer: list[tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None] = []

    def push(self) -> bool:
        """Begin to pack what autograd saves on this thread, unless that has begun. If it returns True, :meth:`pop`
        must follow."""
        if not self.needed:
            return False
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if top is not None and "checkpoint" in getattr(top[0], "__module__", ""):
            return False  # it keeps nothing that lies in our buffers, and counts what it sees
        if top is not None and top[0] == self.pack:
            return False
        self._outer.append(top)
        torch._C._autograd._push_saved_tensors_default_hooks(self.pack, self.unpack)
        return True

    def pop(self) -> None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        self._outer.pop()

    def pack(self, tensor: Tensor) -> Any:
        outer = self._outer[-1]
        with leave_modes():
            found = self._find(tensor)
            if found is not None:
                return found
            if outer is None:
                # What an operation saves of its own output would hold the operation: a graph that no backward frees
                # would stay forever. Torch gives what is unpacked its place in the graph in any case.
                return tensor if tensor.grad_fn is None else tensor.detach()
        return _Foreign(outer[1], outer[0](tensor))

    def unpack(self, saved: Any) -> Tensor:
        if isinstance(saved, _Foreign):
            return saved.unpack(saved.packed)
        if not isinstance(saved, SavedWeight):
            return saved  # type: ignore[no-any-return]
        unit, weights = saved.unit, saved.bucket.weights
        with leave_modes():
            if saved.generation != weights.generation or saved.version != saved.param._version:
                raise RuntimeError(
                    f"one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"parameter {saved.name!r} was changed (by step(), or in place) between this forward and its "
                    f"backward."
                )
            self._pre_backward(unit)
            if weights.full is None:
                raise AssertionError(f"unit {unit.name} was needed and is not here")
            if saved.is_param:  # of what requires a gradient, torch makes a plain tensor in any case
                return saved.param
            return weights.full.as_strided(saved.size, saved.stride, weights.full.storage_offset() + saved.offset)

    def _find(self, tensor: Tensor) -> SavedWeight | None:
        """The place of ``tensor``, if it lies in the full weights of a unit."""
        if self._pool is None or not torch._C._has_storage(tensor) or not tensor.numel():
            return None
        label: tuple[Unit, Bucket] | None = self._pool.label_of(tensor)
        if label is None:
            return None
        unit, bucket = label
        full, entries = bucket.weights.full, bucket.plan.entries
        if full is None or tensor.dtype != bucket.plan.dtype or not _share_storage(full, tensor):
            return None
        offset = int(tensor.storage_offset()) - int(full.storage_offset())
        index = bisect_right(entries, offset, key=lambda entry: entry.offset) - 1
        param, entry = bucket.params[index], entries[index]
        is_param = (
            not param.requires_grad
            and has_own_attributes(param)
            and (offset, tensor.size(), tensor.stride()) == (entry.offset, entry.param.shape, entry.param.stride)
        )
        return SavedWeight(
            unit, bucket, bucket.weights.generation, param, param._version, entry.param.name,
            tensor.size(), tensor.stride(), offset,
            is_param=is_param,
        )  # fmt: skip


def _share_storage(a: Tensor, b: Tensor) -> bool:
    """Whether both lie in the same memory; a label may be older than the buffer."""
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
