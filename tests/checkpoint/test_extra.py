"""What modules keep by ``get_extra_state`` is saved, restored, and part of the whole state dict."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shardline
from shardline.errors import CheckpointError
from tests.harness import Setup


class Counting(nn.Module):
    """Holds what is neither parameter nor buffer: numbers, names, tensors."""

    def __init__(self, extra=None):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.extra = extra

    def forward(self, x):
        return self.linear(x)

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        if state == "refused":
            raise ValueError("not this one")
        self.extra = state


def value(rank=0):
    return {"seen": 3 + rank, "scale": torch.arange(6.0).view(2, 3) + rank, "names": ("a", [1.5, None])}


def model(extra):
    """The same module twice, as torch's own state dict has it, and one inside another."""
    torch.manual_seed(0)
    inner = Counting(extra)
    return nn.Sequential(inner, nn.Sequential(Counting(7), nn.Linear(4, 4)), inner)


def build(extra, stage=3):
    return shardline.initialize(model=model(extra), config=Setup().config(stage))[0]


def plain(state):
    return {
        key: [item["seen"], item["scale"].tolist(), item["names"]] if isinstance(item, dict) else item
        for key, item in state.items()
        if "_extra_state" in key
    }


def takers(built):
    named = built.module.named_modules(remove_duplicate=False)
    return [(f"{path}._extra_state", module) for path, module in named if isinstance(module, Counting)]


def round_trip(path):
    rank = int(torch.distributed.get_rank())
    built = build(value(rank))
    whole = built.full_state_dict()
    fresh = model(None)
    order = list(fresh.state_dict()) == list(whole)
    fresh.load_state_dict(whole)  # strict
    built.save_checkpoint(path)
    built.save_checkpoint(path, tag="background", async_save=True)
    built.module[0].extra["scale"].add_(100)  # the moment of the call is what is saved
    built.destroy()
    found = [order, plain(whole), plain(fresh.state_dict())]
    for tag in (None, "background"):
        again = build(None, 1)
        again.load_checkpoint(path, tag)
        found.append(plain({key: each.extra for key, each in takers(again)}))
        again.destroy()
    return found


def test_it_comes_back(ranks, tmp_path):
    """Rank 0's on every rank."""
    wanted = plain(model(value()).state_dict())
    assert len(wanted) == 3
    for order, *found in ranks(round_trip, 2, str(tmp_path)):
        assert order and all(each == wanted for each in found)


def others(path):
    """Checkpoints and models of which one has extra state, and values that cannot be saved or taken."""
    said = []

    def attempt(action):
        try:
            said.append(action())
        except CheckpointError as error:
            said.append(str(error))

    built = build({"x": object()}, 0)
    attempt(lambda: built.save_checkpoint(path))
    own = built.full_state_dict()["0._extra_state"]
    said.append(own is built.module[0].extra)  # a state dict in memory may hold anything
    built.module[0].extra = "refused"
    built.save_checkpoint(path)
    attempt(lambda: built.load_checkpoint(path))
    torch.manual_seed(0)
    without = nn.Sequential(nn.Sequential(), nn.Sequential(nn.Sequential(), nn.Linear(4, 4)))
    for index in ((0,), (1, 0)):
        spot = without
        for each in index:
            spot = spot[each]
        spot.linear = nn.Linear(4, 4)
    other = shardline.initialize(model=without, config=Setup().config(0))[0]
    attempt(lambda: other.load_checkpoint(path))
    attempt(lambda: other.load_checkpoint(path, load_module_strict=False)[0])
    other.save_checkpoint(path, tag="without")
    notes = []
    built.events.subscribe(lambda event: notes.append(getattr(event, "message", "")))
    attempt(lambda: built.load_checkpoint(path, "without"))
    built.load_checkpoint(path, "without", load_module_strict=False)
    said.append(notes)
    built.destroy()
    other.destroy()
    return said


def test_what_cannot_be_saved_or_taken(ranks, tmp_path):
    unsaved, same, refused, strict, loaded, missing, notes = ranks(others, 1, str(tmp_path))[0]
    assert "get_extra_state() of module '0' cannot be saved: extra_state['0']['x'] is a builtins.object" in unsaved
    assert same
    assert "set_extra_state() of module '0' raised ValueError: not this one" in refused
    assert strict and str(loaded).endswith("global_step0")
    assert "not in the checkpoint: 0._extra_state, 1.0._extra_state" in missing
    assert any("not in the checkpoint: 0._extra_state" in note for note in notes)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_model_without_any_is_as_before(ranks, stage):
    assert ranks(keys, 2, stage) == [["weight", "bias"]] * 2


def keys(stage):
    built = shardline.initialize(model=nn.Linear(4, 4), config=Setup().config(stage))[0]
    found = list(built.full_state_dict())
    built.destroy()
    return found
