from __future__ import annotations

import pytest
import torch

import shardline
from shardline.runtime.memory import resident_bytes

needs_accelerator = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")


@pytest.fixture
def accelerator():
    return shardline.get_accelerator()


def test_there_is_one(accelerator):
    assert shardline.get_accelerator() is accelerator


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the CPU's answers")
class TestOnCpu:
    def test_names(self, accelerator):
        assert not accelerator.is_available()
        assert accelerator.device_name() == accelerator.device_name(0) == accelerator.current_device_name() == "cpu"
        assert accelerator.device(0) == torch.device("cpu")
        assert (accelerator.device_count(), accelerator.current_device()) == (1, 0)
        assert accelerator.communication_backend_name() == "gloo"

    def test_calls_that_mean_nothing_are_harmless(self, accelerator):
        accelerator.set_device(0)
        accelerator.synchronize()
        accelerator.empty_cache()
        accelerator.reset_peak_memory_stats()

    def test_memory_is_that_of_the_process_and_the_machine(self, accelerator):
        assert accelerator.memory_allocated() == pytest.approx(resident_bytes(), rel=0.1)
        assert accelerator.memory_allocated() <= accelerator.max_memory_allocated() * 1.01
        assert accelerator.max_memory_allocated() < accelerator.total_memory()
        assert 0 < accelerator.available_memory() < accelerator.total_memory()

    def test_dtypes_can_be_computed_with(self, accelerator):
        assert accelerator.is_bf16_supported() and accelerator.is_fp16_supported()
        for dtype in (torch.bfloat16, torch.float16):
            assert (torch.ones(2, 2, dtype=dtype) @ torch.ones(2, 2, dtype=dtype)).sum() == 8


@pytest.mark.parametrize("call", ["manual_seed", "manual_seed_all"])
def test_seeds(accelerator, call):
    device = accelerator.device()
    draws = []
    for _ in range(2):
        getattr(accelerator, call)(7)
        draws.append(torch.rand(3, device=device))
    assert torch.equal(*draws)


@pytest.mark.gpu
@needs_accelerator
def test_on_an_accelerator(accelerator):
    kind = torch.accelerator.current_accelerator().type
    assert accelerator.device_name() == kind
    assert accelerator.device_name(0) == f"{kind}:0"
    accelerator.set_device(0)
    assert accelerator.current_device_name() == f"{kind}:0"
    before = accelerator.memory_allocated()
    big = torch.ones(10_000_000, device=accelerator.device())
    accelerator.synchronize()
    assert accelerator.memory_allocated() >= before + big.nbytes
    assert accelerator.max_memory_allocated() >= before + big.nbytes
    assert big.nbytes < accelerator.available_memory() < accelerator.total_memory()
