"""The twin is the specification, so it is itself compared with the plainest loops."""

from __future__ import annotations

import math

import pytest
import torch

from tests.harness import Setup, assert_close, assert_identical, seeded, spread, train_twin
from tests.models import ConvNet, Mlp, TinyGpt, cross_entropy, images, mse, regression, tokens
from tests.twin import LossScale, Twin


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_fp32_is_a_plain_loop(optimizer, clip):
    kwargs = {"lr": 0.05, "weight_decay": 0.1} | ({"momentum": 0.9} if optimizer is torch.optim.SGD else {"eps": 1e-4})
    plain = seeded(TinyGpt)
    stepper = optimizer(plain.parameters(), **kwargs)
    twin = Twin(seeded(TinyGpt), lambda masters: optimizer(list(masters.values()), **kwargs), clip=clip)
    for seed in range(4):
        batch = tokens(8, seed=seed)
        stepper.zero_grad()
        cross_entropy(plain, plain, batch).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip or math.inf)
        stepper.step()
        twin.backward(cross_entropy(twin, twin.model, batch))
        assert twin.step()
        torch.testing.assert_close(twin.norm, norm.item(), rtol=1e-6, atol=0)
        assert not clip or norm > clip
    assert_close(twin.state(), plain.state_dict())


def test_micro_batches_add_up_to_one_batch():
    x, y = regression(12)
    whole, cut = (Setup(optimizer="SGD").twin(seeded(Mlp)) for _ in range(2))
    whole.backward(mse(whole, whole.model, (x, y)))
    for size, part in zip((6, 1, 5), zip(x.split([6, 1, 5]), y.split([6, 1, 5]), strict=True), strict=True):
        cut.backward(mse(cut, cut.model, part), weight=size)
    whole.step()
    cut.step()
    assert_close(cut.state(), whole.state())


def test_sums_with_counts_are_means():
    """`engine.step(weight=...)`: losses that are sums, divided by how many terms they had."""
    x, y = regression(12)
    mean, total = (Setup(optimizer="SGD").twin(seeded(Mlp)) for _ in range(2))
    mean.backward(mse(mean, mean.model, (x, y)))
    total.backward(mse(total, total.model, (x, y)) * y.numel(), weight=1.0, count=y.numel())
    mean.step()
    total.step()
    assert_close(total.state(), mean.state())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_is_plain_pytorch_with_masters(dtype):
    """Weights in `dtype`, an fp32 copy that the optimizer steps, gradients added up in fp32."""
    setup = Setup(dtype, "SGD", accumulation=2, scale_power=6)
    batches = spread(regression, 3, setup, 1)
    twin, result = train_twin(Mlp, mse, batches, setup)
    low = seeded(Mlp).to(twin.dtype)
    masters = [p.detach().clone() for p in seeded(Mlp).parameters()]
    stepper = torch.optim.SGD(masters, lr=0.05, momentum=0.9, weight_decay=0.01)
    for window in batches:
        for master in masters:
            master.grad = torch.zeros_like(master)
        for ((x, y),) in window:
            scale = 2.0**6 if dtype == "fp16" else 1.0
            (mse(low, low, (x.to(twin.dtype), y)) * scale).backward()
            for master, p in zip(masters, low.parameters(), strict=True):
                master.grad += p.grad.float() / scale / len(window)
                p.grad = None
        stepper.step()
        for master, p in zip(masters, low.parameters(), strict=True):
            p.data.copy_(master)
    assert_close(result["state"], dict(zip(result["state"], masters, strict=True)))
    assert all(p.dtype == twin.dtype for p in twin.params.values())
    assert result["losses"][-1][0] < result["losses"][0][0]


def test_statistics_keep_fp32_weights():
    twin = Setup("bf16").twin(seeded(ConvNet))
    twin.backward(cross_entropy(twin, twin.model, images(4)))
    assert twin.step()
    dtypes = {name: p.dtype for name, p in twin.params.items()}
    assert dtypes["norm1.weight"] == dtypes["norm2.bias"] == torch.float32
    assert dtypes["conv1.weight"] == dtypes["head.bias"] == torch.bfloat16


def test_overflow_skips_and_halves():
    setup = Setup("fp16", "SGD", scale_power=24)
    batches = spread(regression, 12, setup, 1)
    twin, result = train_twin(Mlp, mse, batches, setup)
    assert 0 < twin.skipped < 12
    assert twin.scale.value == 2.0 ** (24 - twin.skipped)
    plain = Setup("fp16", "SGD", scale_power=6)
    _, expected = train_twin(Mlp, mse, batches[twin.skipped :], plain)
    assert_close(result["state"], expected["state"], "fp16", seeded(Mlp).state_dict())


@pytest.mark.parametrize(
    ("hysteresis", "window", "overflows", "expected"),
    [
        (1, 1000, "111", [8, 4, 2]),
        (1, 1000, "11111111", [8, 4, 2, 1, 1, 1, 1, 1]),  # never below the minimum
        (2, 1000, "1111", [16, 8, 4, 2]),  # the first is forgiven, once
        (2, 3, "1000101", [16, 16, 16, 32, 32, 32, 16]),  # a window of good steps doubles and forgives again
        (1, 2, "00100", [16, 32, 16, 16, 32]),
    ],
)
def test_dynamic_scale(hysteresis, window, overflows, expected):
    scale = LossScale(16, window, hysteresis)
    seen = []
    for overflow in overflows:
        scale.update(overflow == "1")
        seen.append(scale.value)
    assert seen == expected


def test_unused_and_frozen_parameters():
    model = seeded(Mlp)
    model.head.requires_grad_(False)
    twin = Setup("bf16", "AdamW").twin(model)
    before = twin.state()
    twin.backward(torch.nn.functional.mse_loss(twin(*regression(4)[:1]).float(), regression(4)[1]))
    twin.step()
    after = twin.state()
    changed = {name for name in after if not torch.equal(after[name].float(), before[name].float())}
    assert changed == {name for name in after if name.startswith("blocks.")}
    assert not any(name.startswith("head") for name in twin.masters)


def test_repeats_bit_by_bit():
    setup = Setup("bf16", "AdamW", clip=1.0, accumulation=3)
    batches = spread(tokens, 2, setup, 2)
    first, second = (train_twin(TinyGpt, cross_entropy, batches, setup)[1]["state"] for _ in range(2))
    assert_identical(first, second)
