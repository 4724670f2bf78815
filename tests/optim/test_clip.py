"""The norm against float64, at sizes where fp32 sums go wrong; and what clipping divides by."""

from __future__ import annotations

import math

import pytest
import torch

from shardline.optim.clip import clip_divisor, square_sum

CPU = torch.device("cpu")


def test_exact_at_twenty_million_elements() -> None:
    """torch's own fp32 norm of one long vector is off by 1e-4 to 1e-3 here; 1e-6 is asked for."""
    gradient = torch.randn(20_000_003, generator=torch.Generator().manual_seed(0))
    exact = sum(float(part.double().square().sum()) for part in gradient.split(1 << 20))
    assert float(square_sum([gradient], CPU)) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [[], [0], [1], [16_384], [16_383, 0, 16_385], [40_000, 7]])
def test_any_dtype_and_any_cut(dtype, sizes) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(size).to(dtype) for size in sizes]
    found = square_sum(gradients, CPU)
    assert found.dtype is torch.float64 and found.dim() == 0
    # torch adds 16-bit elements up in fp32 one after the other: a row is good to 1e-5
    rel = 1e-6 if dtype.itemsize >= 4 else 2e-5
    assert float(found) == pytest.approx(sum(float(g.double().square().sum()) for g in gradients), rel=rel)


def test_squares_that_overflow_fp16_do_not_overflow_the_sum() -> None:
    assert float(square_sum([torch.full((100,), 6e4, dtype=torch.float16)], CPU)) == pytest.approx(3.6e11, rel=2e-3)
    many = [torch.full((16_384,), 1e17) for _ in range(3)]  # each row's square fits fp32, their sum does too in fp64
    assert float(square_sum([torch.cat(many)], CPU)) == pytest.approx(3 * 16_384 * 1e34, rel=1e-4)


def test_a_norm_whose_square_passes_fp32_counts_as_overflow() -> None:
    assert float(square_sum([torch.full((100,), 1e30)], CPU)) == float("inf")


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 16_384, 49_151, 49_152, 50_000])
def test_one_bad_element_shows(bad, place) -> None:
    gradient = torch.ones(50_001)
    assert math.isfinite(square_sum([torch.ones(3), gradient], CPU))
    gradient[place] = bad
    assert not math.isfinite(square_sum([torch.ones(3), gradient], CPU))


@pytest.mark.parametrize("norm", [0.0, 0.5, 0.999, 1.0, 3.0, 1e6])
@pytest.mark.parametrize("limit", [0.25, 1.0, 10.0])
def test_dividing_clips_as_torch_does(norm, limit) -> None:
    """``clip_grad_norm_`` multiplies by limit / (norm + 1e-6) where that is below 1."""
    weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    weight.grad = torch.full((4,), norm / 2, dtype=torch.float64)
    before = weight.grad.clone()
    torch.nn.utils.clip_grad_norm_([weight], limit)
    found = clip_divisor(torch.tensor(norm, dtype=torch.float64), limit)
    torch.testing.assert_close(before / found, weight.grad, rtol=1e-12, atol=0)
    assert float(found) >= 1.0


def test_no_limit_divides_by_one_and_bad_norms_stay_bad() -> None:
    assert float(clip_divisor(torch.tensor(1e30), 0.0)) == 1.0
    assert math.isinf(clip_divisor(torch.tensor(math.inf), 1.0)) and math.isnan(
        clip_divisor(torch.tensor(math.nan), 1.0)
    )
