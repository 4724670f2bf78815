"""OptimizerOptions of param groups as values: what tells two groups apart, whatever kind of number a rank holds."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from torch import nn

from shardline.optim.options import OptimizerOptions


def options(**changed):
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    optimizer = torch.optim.AdamW([{"params": params[:1], "lr": 0.1}, {"params": params[1:]}], lr=0.2)
    optimizer.param_groups[1].update(changed)
    return OptimizerOptions(lambda: optimizer)


PLAIN = options().read()[0]


@pytest.mark.parametrize(
    "changed",
    [
        {"lr": 0.2 + 1e-9},
        {"weight_decay": 0.0},
        {"betas": (0.9, 0.98)},
        {"betas": [0.9, 0.98]},
        {"amsgrad": True},
        {"mine": 3},
        {"mine": "text"},
        {"mine": None},
        {"lr": torch.tensor(0.3)},
        {"lr": math.nan},
    ],
)
def test_every_scalar_option_counts(changed) -> None:
    found, tensors = options(**changed).read()
    assert repr(found) != repr(PLAIN) and not tensors
    assert repr(found) == repr(options(**changed).read()[0])


@pytest.mark.parametrize(
    "same",
    [
        {"lr": numpy.float64(0.2)},
        {"lr": torch.tensor(0.2, dtype=torch.float64)},
        {"weight_decay": numpy.float64(0.01)},
        {"betas": [0.9, 0.999]},
        {"mine": object()},
        {"mine": torch.zeros(3)},
    ],
)
def test_the_same_number_is_the_same(same) -> None:
    assert repr(options(**same).read()[0]) == repr(PLAIN)


def test_an_integer_is_the_float_of_another_rank() -> None:
    assert (
        repr(options(lr=1).read()[0]) == repr(options(lr=1.0).read()[0]) == repr(options(lr=numpy.int64(1)).read()[0])
    )


def test_a_tensor_on_a_device_is_not_read() -> None:
    found, tensors = options(lr=torch.empty((), device="meta")).read()
    assert [tensor.device.type for tensor in tensors] == ["meta"] and repr(found) != repr(PLAIN)
    named = OptimizerOptions(lambda: None).names(found, [0.75])
    assert named["lr of param group 1"] == "0.75" and named["lr of param group 0"] == "0.1"
    assert named["betas[1] of param group 0"] == "0.999"


def test_without_an_optimizer_there_are_none() -> None:
    assert OptimizerOptions(lambda: None).read() == ([], [])
