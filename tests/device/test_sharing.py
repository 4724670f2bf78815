"""Ranks that share a device, and the CPU beside a device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardline
from shardline.comm.transport import HostStagedTransport
from shardline.errors import DisagreementError
from shardline.events import Notice
from shardline.observe.sinks import Sinks
from shardline.runtime import process_group, topology
from shardline.testing import Pool
from tests.conftest import Ranks
from tests.device import simulated
from tests.device.conftest import DeviceRanks
from tests.device.training import config, make, train, train_all


class OneDevice(DeviceRanks):
    """Every rank sees one device, the same one."""

    def make_pool(self, world_size: int) -> Pool:
        return Pool(world_size, env={"SIMULATED_DEVICES": "1"}, preload=[simulated.__name__])


@pytest.fixture(scope="module")
def one_device() -> Iterator[Ranks]:
    shared = OneDevice()
    yield shared
    shared.close()


def notices_of(settings: dict[str, Any], patch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    said: list[str] = []
    attach = Sinks.attach

    def listen(self: Sinks, events: Any, *args: Any) -> None:
        events.subscribe(lambda event: said.append(event.message) if isinstance(event, Notice) else None)
        attach(self, events, *args)

    patch.setattr(Sinks, "attach", listen)
    return make(settings), said


def share(cases: list[dict[str, Any]]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        engine, said = notices_of(cases[0], patch)
        staged = isinstance(engine.comm.gathers, HostStagedTransport)
        device = str(engine.device)
        engine.destroy()
    return device, staged, said, train_all(cases), simulated.races()


CASES = [config(0, "fp32"), config(1), config(2, accumulation=2), config(3), config(3, "fp32", optimizer="Lamb")]


def test_two_ranks_of_one_device_train_as_two_of_the_cpu(one_device: Ranks, cpu_ranks: Ranks) -> None:
    """The script made its group for nccl, which refuses that."""
    expected = cpu_ranks(train_all, 2, CASES)
    for (device, staged, said, found, races), wanted in zip(one_device(share, 2, CASES), expected, strict=True):
        assert device == "cuda:0" and staged and races == []
        assert [text for text in said if "ranks 0, 1 share a cuda device" in text]
        for (losses, total), (losses_there, total_there) in zip(found, wanted, strict=True):
            torch.testing.assert_close(losses, losses_there, rtol=3e-3, atol=1e-4)
            assert total == pytest.approx(total_there, rel=1e-3)


def given(store: Any, *args: Any) -> Any:
    return store


def groups_of(backends: list[str | None]) -> list[tuple[str, str, bool, float]]:
    """A group of each backend, made by the script (None: by Shardline), and an engine in it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = []
    for turn, backend in enumerate(backends):
        store = dist.PrefixStore(f"turn{turn}", dist.distributed_c10d._get_default_store())
        dist.destroy_process_group()
        if backend is None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(process_group, "_store", partial(given, store))
                process_group.init_distributed(timeout=timedelta(seconds=30))
        else:
            dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        engine = make(config(3))
        staged = isinstance(engine.comm.gathers, HostStagedTransport)
        value = torch.ones(1, device=engine.device if backend is None else "cpu")
        if backend != "cuda:simulated":
            dist.all_reduce(value)
        found.append((str(engine.device), topology.discover().backend, staged, float(value)))
        engine.destroy()
    return found


BACKENDS = [None, "cuda:simulated", "gloo", "cpu:gloo", "cpu:gloo,cuda:simulated"]


def test_groups_of_every_backend_on_one_device() -> None:
    pool = OneDevice()  # processes of its own: their group is made again
    try:
        for found in pool(groups_of, 2, BACKENDS[1:]):
            assert [(device, staged) for device, _, staged, _ in found] == [("cuda:0", True)] * 4
    finally:
        pool.close()


def test_groups_of_every_backend_on_a_device_each() -> None:
    pool = DeviceRanks()
    try:
        for rank, found in enumerate(pool(groups_of, 2, BACKENDS)):
            assert [device for device, _, _, _ in found] == [f"cuda:{rank}"] * 5
            assert [staged for _, _, staged, _ in found] == [False, False, True, True, False]
            assert found[0][1] == "cpu:gloo,cuda:simulated" and found[0][3] == 2
    finally:
        pool.close()


def backend_here() -> tuple[str, str]:
    """Of a group that would be made here; twice, as by a job that destroys its group and makes another."""
    store, world = dist.distributed_c10d._get_default_store(), dist.get_world_size()
    device = topology.discover().device
    first, second = (
        process_group._backend_for_all(process_group._own_part(store, world), world, device) for _ in range(2)
    )
    return first, second


def test_a_group_made_here_is_of_gloo_where_a_device_is_shared(one_device: Ranks, ranks: Ranks) -> None:
    assert one_device(backend_here, 2) == [("gloo", "gloo")] * 2
    assert ranks(backend_here, 2) == [("cpu:gloo,cuda:simulated",) * 2] * 2


def on_the_cpu() -> Any:
    simulated.waits()  # of what ran here before
    shardline.init_distributed(device="cpu")
    engine = make(config(2, "fp32"))
    helper = shardline.get_accelerator()
    names = engine.device.type, helper.device_name(), helper.device_count(), helper.communication_backend_name()
    engine.destroy()
    return names, train(config(2, "fp32")), simulated.waits()


def test_the_cpu_beside_a_device(ranks: Ranks, cpu_ranks: Ranks) -> None:
    expected = cpu_ranks(train, 2, config(2, "fp32"))
    for (names, trained, waits), wanted in zip(ranks(on_the_cpu, 2), expected, strict=True):
        assert names == ("cpu", "cpu", 1, "gloo")
        assert trained[0] == wanted[0] and trained[1] == pytest.approx(wanted[1], rel=1e-9) and waits == []


def of_two_minds() -> str:
    if dist.get_rank() == 1:
        os.environ["SHARDLINE_DEVICE"] = "cpu"
    with pytest.raises(DisagreementError) as raised:
        make(config(2))
    return str(raised.value)


def test_ranks_of_two_minds_say_so(ranks: Ranks) -> None:
    for said in ranks(of_two_minds, 2):
        assert said.startswith("rank 0 computes on cuda and rank 1 on cpu")
