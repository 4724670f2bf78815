"""Lion against the paper's algorithm written as a loop over numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardline.errors import ConfigError
from shardline.optim import Lion


def lion(weights: list[float], grads: list[list[float]], lr: float, b1: float, b2: float, decay: float) -> list[float]:
    """Chen et al. 2023, algorithm 2, one number at a time."""
    momenta = [0.0] * len(weights)
    for step in grads:
        for i, g in enumerate(step):
            c = b1 * momenta[i] + (1 - b1) * g
            sign = (c > 0) - (c < 0)
            weights[i] = weights[i] - lr * (sign + decay * weights[i])
            momenta[i] = b2 * momenta[i] + (1 - b2) * g
    return weights


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(5, 7, generator=generator, dtype=torch.float64),
        torch.randn(9, 5, 7, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.98), (0.0, 0.0), (0.4, 0.3)])
def test_lion_is_the_papers(betas: tuple[float, float], decay: float) -> None:
    start, grads = problem()
    expected = lion(start.flatten().tolist(), grads.flatten(1).tolist(), 0.01, *betas, decay)
    p = start.clone().requires_grad_()
    optimizer = Lion([p], lr=0.01, betas=betas, weight_decay=decay)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(p.detach().flatten(), torch.tensor(expected, dtype=torch.float64))


def test_an_element_without_gradient_stays() -> None:
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.tensor([0.0, 1.0, -1.0])
    Lion([p], lr=0.5).step()
    assert p.tolist() == [1.0, 0.5, 1.5]


def test_groups_closures_and_parameters_without_gradient() -> None:
    first, second, third = (torch.ones(2, requires_grad=True) for _ in range(3))
    optimizer = Lion([{"params": [first, second]}, {"params": [third], "lr": 0.25}], lr=0.5)

    def closure() -> float:
        optimizer.zero_grad()
        loss = first.sum() + third.sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert (first[0].item(), second[0].item(), third[0].item()) == (0.5, 1.0, 0.75)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"betas": (0.9,)}, {"weight_decay": -0.1}])
def test_hyperparameters_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is .*; it must be"):
        Lion([torch.ones(1, requires_grad=True)], **wrong)  # type: ignore[arg-type]
