"""The user's optimizer goes on as the same object over other tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from shardline.errors import OptimizerError
from shardline.optim import prepare, replace_params


def test_a_scheduler_attached_before_goes_on() -> None:
    net = nn.Linear(4, 2)
    optimizer = AdamW([{"params": [("w", net.weight)], "lr": 0.1}, {"params": [("b", net.bias)]}], lr=0.2)
    scheduler = StepLR(optimizer, 1)
    dicts = list(map(id, optimizer.param_groups))
    runs = [[torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)], []]
    replace_params(optimizer, runs)

    assert list(map(id, optimizer.param_groups)) == dicts
    for run in runs[0]:
        run.grad = torch.ones(4)
    before = net.weight.detach().clone()
    optimizer.step()
    scheduler.step()
    assert torch.equal(net.weight, before)
    assert all(run[0].item() < 1.0 for run in runs[0])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.02])
    assert set(optimizer.state) == set(runs[0])
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("kind", [AdamW, SGD, Adagrad])
def test_a_fresh_optimizer_has_nothing_to_carry(kind: type[Optimizer]) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = kind([p])
    optimizer.state[p]  # asking creates an empty entry, which is not a state; Adagrad has made one
    new = torch.ones(2, requires_grad=True)
    replace_params(optimizer, [[new]])
    prepare(optimizer)
    new.grad = torch.ones(2)
    optimizer.step()
    twin = torch.ones(2, requires_grad=True)
    twin.grad = torch.ones(2)
    kind([twin]).step()
    assert torch.equal(new, twin)
    assert new[0].item() < 1.0


def used() -> tuple[Tensor, Optimizer]:
    p = nn.Parameter(torch.arange(4.0))
    optimizer = SGD([p], lr=0.5, momentum=0.5)
    p.grad = torch.arange(4.0)
    optimizer.step()
    return p, optimizer


def test_state_is_refused_unless_it_is_carried() -> None:
    p, optimizer = used()
    with pytest.raises(OptimizerError, match="SGD already holds state for 1 parameters"):
        replace_params(optimizer, [[torch.ones(2, requires_grad=True)]])
    assert optimizer.param_groups[0]["params"] == [p]

    halves = [half.clone().requires_grad_() for half in p.detach().split(2)]

    def carry(state: Mapping[Tensor, Mapping[str, Any]]) -> dict[Tensor, dict[str, Any]]:
        pieces = state[p]["momentum_buffer"].split(2)
        return {half: {"momentum_buffer": piece.clone()} for half, piece in zip(halves, pieces, strict=True)}

    replace_params(optimizer, [halves], carry)
    twin, reference = used()
    twin.grad = torch.ones(4)
    reference.step()
    for half in halves:
        half.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(torch.cat([half.detach() for half in halves]), twin.detach())
    assert p not in optimizer.state


def test_a_second_reference_to_the_parameters_is_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = LBFGS([p])
    with pytest.raises(OptimizerError, match="LBFGS keeps its parameters in its attribute '_params'"):
        replace_params(optimizer, [[torch.ones(2, requires_grad=True)]])
    assert optimizer.param_groups[0]["params"] == [p]
