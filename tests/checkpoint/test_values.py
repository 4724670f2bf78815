"""Values of the user come back as they were, or are refused by name."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy
import pytest
import torch
from torch import nn

from shardline.checkpoint.format.values import decode, encode
from shardline.errors import CheckpointError


def round_trip(value):
    tensors = {}
    text = json.dumps(encode(value, "client_state", tensors), allow_nan=False)
    return decode(json.loads(text), tensors.__getitem__)


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, 2**70, 0.1, -0.0, float("inf"), "text", [1, [2]], (1, (2,)), {"a": {"b": 1}},
        {1: 2, (3, 4): "x"}, {"$tuple": [1]}, Counter({3: 2}), {"a": (1, [None])},
    ],
)  # fmt: skip
def test_values_come_back_with_their_types(value):
    again = round_trip(value)
    assert again == value and type(again) is type(value)
    assert repr(again) == repr(value)


def test_nan_comes_back():
    assert math.isnan(round_trip(float("nan")))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_tensors_come_back_with_their_dtype(dtype):
    for value in (torch.tensor([[0.1, 1.0], [2.0, -3.0]]).to(dtype), torch.tensor(1.1).to(dtype)):
        again = round_trip({"x": [value]})["x"][0]
        assert again.dtype == dtype and again.shape == value.shape and torch.equal(again, value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": [nn.Linear(1, 1)]}, r"client_state\['a'\]\[0\] is a torch.nn.modules.linear.Linear.*state_dict"),
        ({"x": numpy.zeros(2)}, "torch.from_numpy"),
        ({"x": numpy.float32(1)}, "item"),
        ({"x": {1, 2}}, "sorted list"),
        ({"x": b"1"}, "string"),
        ({"x": print}, "Write down"),
        ({"x": torch.eye(2).to_sparse()}, "dense"),
    ],
)
def test_anything_else_says_where_it_is_and_what_to_do(value, said):
    with pytest.raises(CheckpointError, match=said):
        encode(value, "client_state", {})
