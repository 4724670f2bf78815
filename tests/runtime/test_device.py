"""Which device and which way between ranks, on machines of every kind. None of them is here: no GPU has run this."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from shardline.errors import DisagreementError, LaunchError
from shardline.runtime import device
from shardline.runtime.device import Accelerators, RankDevice, choose_backend, choose_device, device_of, usable

CPU, NONE, MAC = torch.device("cpu"), Accelerators(), Accelerators("mps", 1)
BOTH = {"cpu": "gloo", "cuda": "nccl"}


def gpus(count):
    return Accelerators("cuda", count)


def gpu(index):
    return torch.device("cuda", index)


@pytest.mark.parametrize(
    ("here", "local_ranks", "expected"),
    [
        (NONE, 3, [CPU] * 3),
        (gpus(1), 1, [gpu(0)]),
        (gpus(1), 2, [gpu(0), gpu(0)]),  # one GPU for all, or a GPU of its own for each
        (gpus(2), 2, [gpu(0), gpu(1)]),
        (gpus(2), 5, [gpu(0), gpu(1), gpu(0), gpu(1), gpu(0)]),
        (gpus(8), 2, [gpu(0), gpu(1)]),
        (gpus(8), 8, [gpu(rank) for rank in range(8)]),
    ],
)
def test_local_ranks_take_devices_in_turn(here, local_ranks, expected):
    assert [choose_device(here, rank, local_ranks) for rank in range(local_ranks)] == expected


@pytest.mark.parametrize("asked", ["cpu", "cpu:0"])
@pytest.mark.parametrize("seen", [NONE, gpus(1), gpus(8), MAC])
def test_whoever_asks_for_the_cpu_gets_it(seen, asked):
    here, notice = usable(seen, asked)
    assert (here, notice) == (NONE, None)
    assert choose_device(here, 1, 2, asked=asked, model=gpu(0)) == CPU


def test_a_device_that_was_asked_for():
    assert choose_device(*alone(gpus(8)), asked="cuda") == gpu(0)
    assert choose_device(*alone(gpus(8)), asked="cuda:3") == gpu(3)
    assert choose_device(gpus(8), 2, 4, asked="cuda") == gpu(2)
    assert choose_device(*alone(gpus(8)), asked="cuda:3", model=gpu(5)) == gpu(3)
    assert choose_device(gpus(8), 1, 2, asked="") == gpu(1)  # an empty variable asks for nothing


def alone(here):
    return here, 0, 1


@pytest.mark.parametrize(
    ("seen", "asked", "message"),
    [
        (NONE, "cuda", "'cuda' was asked for, and torch sees no accelerator"),
        (gpus(2), "cuda:2", "'cuda:2' was asked for, and torch sees 2 of the type cuda"),
        (gpus(2), "xpu", "torch sees 2 of the type cuda"),
        (gpus(2), "gpu", 'it must be "cpu" or a type of accelerator'),
        (MAC, "mps", "the engine cannot use it: it has no float64"),
    ],
)
def test_a_device_that_is_not_here_is_an_error(seen, asked, message):
    with pytest.raises(LaunchError, match=message):
        usable(seen, asked)


def test_mps_gives_way_to_the_cpu_in_words():
    here, notice = usable(MAC)
    assert here == NONE and notice.startswith("computing on the CPU, not on mps: it has no float64")
    assert choose_device(here, 0, 1, model=torch.device("mps", 0)) == CPU


@pytest.mark.parametrize(
    ("model", "local_rank", "local_ranks", "expected"),
    [
        (None, 1, 2, gpu(1)),
        (gpu(0), 1, 2, gpu(1)),  # .cuda() on every rank is not a choice
        (gpu(3), 1, 2, gpu(3)),
        (gpu(3), 0, 1, gpu(3)),
        (gpu(0), 0, 1, gpu(0)),
        (torch.device("xpu", 3), 1, 2, gpu(1)),
    ],
)
def test_a_model_that_is_on_a_device_stays_there(model, local_rank, local_ranks, expected):
    assert choose_device(gpus(8), local_rank, local_ranks, model=model) == expected


class OnDevices(nn.Module):
    def __init__(self, *devices):
        super().__init__()
        self.devices = [torch.device(each) for each in devices]

    def parameters(self, recurse=True):
        return (FakeTensor(each) for each in self.devices)


@dataclass(frozen=True)
class FakeTensor:
    device: torch.device


@pytest.mark.parametrize(
    ("devices", "expected"),
    [((), None), (("cpu",), None), (("meta", "cuda:1", "cpu"), gpu(1)), (("cuda:0", "cuda:1"), None)],
)
def test_where_a_model_is(devices, expected):
    assert device_of(OnDevices(*devices)) == expected


# --- between ranks ----------------------------------------------------------------------------------------------------


def places(*identities):
    return [RankDevice("cuda", identity) for identity in identities]


@pytest.mark.parametrize(
    ("where", "group", "backend", "word"),
    [
        (places("a", "b"), BOTH, None, None),
        (places("a", "b"), {"cuda": "nccl"}, None, None),
        (places("a", "a"), BOTH, "gloo", "ranks 0, 1 share a cuda device"),
        (places("a", "a"), {"cuda": "nccl"}, "gloo", "ranks 0, 1 share"),
        (places("a", "a"), {"cpu": "gloo", "cuda": "gloo"}, "gloo", "share"),
        (places("a", "b", "c", "b"), BOTH, "gloo", "ranks 1, 3 share"),
        (places("a", "b"), {"cpu": "gloo", "cuda": "gloo"}, None, "give it 'cpu:gloo,cuda:nccl'"),
        (places("a", "b"), {"cpu": "gloo"}, "gloo", "no backend of cuda's own"),
        ([RankDevice("cpu", "")] * 4, {"cpu": "gloo"}, None, None),
        ([RankDevice("cpu", "")] * 4, BOTH, None, None),
        ([RankDevice("cpu", "")] * 4, {"cuda": "nccl"}, "gloo", None),
    ],
)
def test_how_tensors_travel(where, group, backend, word):
    found, notice = choose_backend(where, group)
    assert found == backend
    assert notice is None if word is None else word in notice


def test_few_ranks_are_named():
    _, notice = choose_backend(places(*"a" * 20), BOTH)
    assert "ranks 0 to 19 share" in notice


def test_ranks_on_devices_of_two_types_are_an_error():
    with pytest.raises(DisagreementError, match=r"rank 0 computes on cuda and rank 1 on cpu.*SHARDLINE_DEVICE"):
        choose_backend([RankDevice("cuda", "a"), RankDevice("cpu", "")], BOTH)


def test_a_device_is_known_by_its_uuid_or_by_host_and_number(monkeypatch):
    class Module:
        uuid = "GPU-1"

        @staticmethod
        def get_device_properties(index):
            return Module

    monkeypatch.setattr(torch, "get_device_module", lambda kind: Module)
    monkeypatch.setattr(device.socket, "gethostname", lambda: "node7")
    assert RankDevice.of(gpu(1)) == RankDevice("cuda", "GPU-1")
    Module.uuid = None
    assert RankDevice.of(gpu(1)) == RankDevice("cuda", "cuda:1 of node7")
    assert RankDevice.of(CPU) == RankDevice("cpu", "")
