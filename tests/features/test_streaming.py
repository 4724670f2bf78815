"""A model on ``meta`` gets its values from a mapping: rank 0 reads them, and no rank holds the model whole."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardline
from shardline.errors import ModelError, UsageError
from tests.harness import Setup, assert_identical, most_bytes, seeded

WIDTH, LAYERS = 64, 8


class Net(nn.Module):
    """Equal blocks, statistics, a part of its own to which nothing gives values, tied ends."""

    def __init__(self, adapted=False):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)
        self.last.weight = self.first.weight
        if adapted:
            self.adapter = nn.Linear(WIDTH, 4)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(self.norm(x))


class Reader(dict):
    """Notes what is read; the values are there on rank 0 alone."""

    def __init__(self, values):
        super().__init__(values if dist.get_rank() == 0 else dict.fromkeys(values))
        self.read = []

    def __getitem__(self, name):
        self.read.append(name)
        return super().__getitem__(name)


def on_meta(build):
    with torch.device("meta"):
        return build()


def values():
    state = seeded(Net, 7).state_dict()
    state["norm.running_mean"] = torch.arange(float(WIDTH))
    return state


def streamed(stage, dtype):
    source = values()
    reader = Reader(source)
    model = on_meta(lambda: Net(adapted=True))
    torch.manual_seed(3)
    engine, *_ = shardline.initialize(model=model, config=Setup(dtype).config(stage), init_fn=reader)
    found = engine.full_state_dict()
    assert_identical({name: found[name] for name in source}, source)
    assert found["adapter.weight"].abs().max() > 0  # initialised as ever
    expected = [name for name in source if name != "last.weight"]  # tied: read once
    assert sorted(reader.read) == (sorted(expected) if dist.get_rank() == 0 else [])
    engine.destroy()


def streamed_everywhere():
    for stage, dtype in ((0, "fp32"), (3, "fp32"), (3, "bf16")):
        streamed(stage, dtype)


@pytest.mark.parametrize("world", [1, 2])
def test_every_rank_gets_its_part_of_what_rank_0_reads(ranks, world):
    ranks(streamed_everywhere, world)


class OneByOne(dict):
    """Makes each value when it is asked for, as a file does."""

    def __init__(self, model):
        super().__init__({name: tuple(value.shape) for name, value in model.state_dict().items()})

    def __getitem__(self, name):
        shape = super().__getitem__(name)
        return torch.ones(shape) if shape else torch.ones((), dtype=torch.int64)


def most_at_once():
    config = Setup().config(3) | {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    model = on_meta(Net)
    engine, most = most_bytes(lambda: shardline.initialize(model=model, config=config, init_fn=OneByOne(model))[0])
    engine.destroy()
    return most


def test_no_rank_holds_more_than_its_shard_and_the_largest_weight(ranks):
    weight = 4 * WIDTH * WIDTH
    whole = (LAYERS + 1) * (weight + 4 * WIDTH)
    for most in ranks(most_at_once, 2):
        assert most <= whole / 2 + 1.2 * weight, (most, whole)


def refusals():
    said = []
    for model, given in (
        (Net(), values()),
        (on_meta(Net), {"firts.weight": torch.zeros(WIDTH, WIDTH)}),
        (on_meta(Net), {"first.weight": torch.zeros(2, 2)}),
    ):
        try:
            shardline.initialize(model=model, config=Setup().config(3), init_fn=given)
        except (UsageError, ModelError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_what_does_not_fit_is_said_on_every_rank(ranks):
    for said in ranks(refusals, 2):
        wanted = [
            "nothing of the model is on meta",
            "'firts.weight' that the model does not have",
            "'first.weight' has the shape (2, 2), and the model's",
        ]
        assert [want in text for want, text in zip(wanted, said, strict=True)] == [True] * 3
