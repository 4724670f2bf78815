"""LAMB against the paper's algorithm written as a loop over numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from shardline.errors import ConfigError
from shardline.optim import Lamb
from shardline.optim.lamb import _norm


def lamb(
    weights: list[float],
    grads: list[list[float]],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    eps_inside_sqrt: bool = False,
    max_coeff: float = 10.0,
    min_coeff: float = 0.01,
) -> list[float]:
    """You et al. 2020, algorithm 2 with phi the identity, the ratio kept within the two limits; one parameter."""
    b1, b2 = betas
    m, v = [0.0] * len(weights), [0.0] * len(weights)
    for t, step in enumerate(grads, start=1):
        updates = []
        for i, g in enumerate(step):
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            mhat = m[i] / (1 - b1**t) if bias_correction else m[i]
            vhat = v[i] / (1 - b2**t) if bias_correction else v[i]
            root = math.sqrt(vhat + eps) if eps_inside_sqrt else math.sqrt(vhat) + eps
            updates.append(mhat / root + weight_decay * weights[i])
        length = math.sqrt(math.fsum(w * w for w in weights))
        change = math.sqrt(math.fsum(u * u for u in updates))
        trust = min(max(length / change, min_coeff), max_coeff) if length > 0 and change > 0 else 1.0
        weights = [w - lr * trust * u for w, u in zip(weights, updates, strict=True)]
    return weights


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "lr": 0.1},
        {"bias_correction": False, "betas": (0.8, 0.95)},
        {"betas": (0.0, 0.0)},
        {"eps_inside_sqrt": True, "eps": 0.1},
        {"eps": 0.1},
        {"max_coeff": 0.5},
        {"min_coeff": 3.0, "max_coeff": 4.0},
    ],
)
def test_lamb_is_the_papers(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(5, 7), (3,), (2, 1, 4)]
    starts = [torch.randn(shape, generator=generator, dtype=torch.float64) * 3 for shape in shapes]
    grads = [torch.randn(8, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    params = [start.clone().requires_grad_() for start in starts]
    optimizer = Lamb(params, **options)
    for step in range(8):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad[step].clone()
        optimizer.step()
    for p, start, grad in zip(params, starts, grads, strict=True):
        expected = lamb(start.flatten().tolist(), grad.flatten(1).tolist(), **options)
        # the step count, and so the bias correction, is fp32
        torch.testing.assert_close(
            p.detach().flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9
        )


def test_zero_weights_take_the_plain_step() -> None:
    p = torch.zeros(4, requires_grad=True)
    p.grad = torch.ones(4)
    Lamb([p], lr=0.5).step()
    torch.testing.assert_close(p.detach(), torch.full((4,), -0.5))


def test_the_norm_of_many_elements_is_right() -> None:
    x = torch.randn(6_000_001, generator=torch.Generator().manual_seed(0))
    exact = x.double().square().sum().sqrt()
    assert abs(_norm(x).double() / exact - 1).item() < 1e-6
    assert abs(torch.linalg.vector_norm(x).double() / exact - 1).item() > 1e-6  # or the second stage is for nothing
    assert _norm(torch.zeros(0)).item() == 0.0


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"max_coeff": 1.0, "min_coeff": 2.0}]
)
def test_hyperparameters_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is .*; it must be"):
        Lamb([torch.ones(1, requires_grad=True)], **wrong)
