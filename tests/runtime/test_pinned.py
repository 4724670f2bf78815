"""Page-locked memory of the size that is asked for. What registers it is faked: no GPU has run this."""

from __future__ import annotations

import gc

import pytest
import torch

from shardline.errors import UsageError
from shardline.runtime.pinned import empty_pinned

GPU = torch.device("cuda", 1)


class Runtime:
    """Of CUDA's runtime what registers memory."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.registered, self.order = code, dict[int, int](), list[str]()

    def cudaHostRegister(self, address, size, flags):
        assert flags == 1
        self.registered[address] = size
        return self.code

    def cudaHostUnregister(self, address):
        del self.registered[address]
        self.order.append("unregister")

    def cudaGetErrorString(self, code):
        return "out of memory"


@pytest.fixture
def runtime(monkeypatch):
    made = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: made.order.append(f"wait for {device}"))
    return made


def test_what_is_locked_is_what_was_asked_for(runtime):
    sizes = [3, 1000, (1 << 20) + 1, 3 << 20]
    made = [empty_pinned(size, torch.float32, GPU) for size in sizes]
    assert [runtime.registered[each.data_ptr()] for each in made] == [4 * size for size in sizes]
    for each in made:
        each.fill_(2.0)
    assert [float(each.sum()) for each in made] == [2.0 * size for size in sizes]


def test_memory_is_given_back_with_the_last_tensor_in_it_once_the_device_is_done(runtime):
    made = empty_pinned(100, torch.bfloat16, GPU)
    part = made[50:].view(torch.int16)
    del made
    gc.collect()
    assert runtime.registered and not runtime.order
    del part
    gc.collect()
    assert not runtime.registered and runtime.order == ["wait for cuda:1", "unregister"]


def test_memory_that_cannot_be_locked_is_an_error(runtime):
    runtime.code = 2
    with pytest.raises(
        UsageError, match=r"did not page-lock 400 bytes of host memory: out of memory\. Raise its limit"
    ):
        empty_pinned(100, torch.float32, GPU)
    gc.collect()
    assert not runtime.order  # it was never locked


def test_for_a_cpu_it_is_ordinary_memory(runtime):
    for numel in (0, 10):
        assert empty_pinned(numel, torch.float32, torch.device("cpu")).shape == (numel,)
    with torch.inference_mode():
        assert not empty_pinned(4, torch.float32, GPU).is_inference()
    gc.collect()
    assert not runtime.registered
