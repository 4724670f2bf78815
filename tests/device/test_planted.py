"""Errors planted one at a time: each must show as a race, as wrong numbers or as an error. The test of these tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from shardline.comm import transport
from shardline.features import offload
from shardline.sharding import step, unit
from tests.device import simulated
from tests.device.training import config, train

KEPT: list[Any] = []  # handles whose end would wait after all


def offload_without_order(patch: pytest.MonkeyPatch) -> None:
    """The stream that copies to the host does not wait for the sum that it copies."""

    def copy_down(self: offload.Offload, shard: torch.Tensor, host: torch.Tensor) -> Callable[[], None]:
        assert self._stream is not None
        with self._stream:
            host.copy_(shard, non_blocking=True)
            return self._stream.record_event().synchronize

    patch.setattr(offload.Offload, "_start_copy", copy_down)


def offload_read_too_soon(patch: pytest.MonkeyPatch) -> None:
    """The host reads a copy that has not arrived."""
    copy_down = offload.Offload._start_copy

    def start(self: offload.Offload, shard: torch.Tensor, host: torch.Tensor) -> Callable[[], None]:
        KEPT.append(copy_down(self, shard, host))
        return lambda: None

    patch.setattr(offload.Offload, "_start_copy", start)


def gather_not_awaited(patch: pytest.MonkeyPatch) -> None:
    """The stream that computes does not wait for an all-gather."""
    gather = transport.NcclTransport.gather

    def lost(self: transport.NcclTransport, *args: Any, **own: Any) -> transport.Work:
        KEPT.append(gather(self, *args, **own))
        return transport.Work(())

    patch.setattr(transport.NcclTransport, "gather", lost)


def sum_before_arrival(patch: pytest.MonkeyPatch) -> None:
    """The sum is read before the reduce-scatter is over."""

    def reduce(
        self: transport.NcclTransport, unit: int, buffer: Any, cuts: Any, out: Any, *, add: bool, scratch: Any
    ) -> transport.Work:
        target = scratch.borrow(out.numel(), buffer.dtype)
        handle = transport._reduce_scatter(target, buffer, group=self.group, async_op=True)
        transport.add_in_order([target], out, add=add)
        return transport.Work([handle], hold=(buffer, target))

    patch.setattr(transport.NcclTransport, "reduce", reduce)


def count_on_the_host(patch: pytest.MonkeyPatch) -> None:
    """The optimizer's step counters are on the host."""
    attach = step.Update.attach

    def attach_and_move(self: step.Update, runs: Any) -> None:
        attach(self, runs)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].cpu()

    patch.setattr(step.Update, "attach", attach_and_move)


def buffer_given_back_too_soon(patch: pytest.MonkeyPatch) -> None:
    """Memory goes back to the allocator while an all-gather still writes it."""
    gather = unit.Unit.unshard

    def gather_and_forget(self: unit.Unit) -> None:
        gather(self)
        for work in self._gathers:
            work._hold = None
            for handle in work._handles:
                KEPT.append(handle)
        for bucket in self.buckets:
            if bucket.weights.full is not None and self._gathers:
                bucket.weights.full = torch.empty_like(bucket.weights.full)

    patch.setattr(unit.Unit, "unshard", gather_and_forget)


PLANTED = [
    (offload_without_order, config(2, offload=True)),
    (offload_read_too_soon, config(2, offload=True)),
    (gather_not_awaited, config(3)),
    (sum_before_arrival, config(2)),
    (count_on_the_host, config(2)),
    (buffer_given_back_too_soon, config(3)),
]


def train_with(plant: Callable[[pytest.MonkeyPatch], None], settings: dict[str, Any]) -> Any:
    """What shows: races, losses that are not numbers, or an error."""
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        try:
            losses, _ = train(settings)
        except RuntimeError as error:
            return [str(error)]
        finally:
            KEPT.clear()
    return simulated.races() + [loss for loss in losses if loss != loss]


@pytest.mark.parametrize(("plant", "settings"), PLANTED, ids=[plant.__name__ for plant, _ in PLANTED])
def test_a_planted_error_shows(plant: Callable[[pytest.MonkeyPatch], None], settings: dict[str, Any]) -> None:
    from tests.device.conftest import DeviceRanks

    ranks = DeviceRanks()  # processes of its own: such an error may leave anything behind
    try:
        assert all(found for found in ranks(train_with, 2, plant, settings, timeout=60))
    finally:
        ranks.close()
