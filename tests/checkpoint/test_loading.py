"""What goes in where the model, the optimizer or its options are others than those that were saved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shardline
from shardline.errors import CheckpointError
from shardline.events import Notice
from tests.checkpoint import cases
from tests.harness import Setup


def try_load(path, settings, extra=0, **options):
    built = cases.engine(settings, extra=extra)
    said = []
    built.events.subscribe(lambda event: said.append(event.message) if isinstance(event, Notice) else None)
    before = built.full_state_dict()
    try:
        built.load_checkpoint(path, **options)
        error = None
    except CheckpointError as caught:
        error = str(caught)
    result = (before, cases.contents(built), error, said, built.lr_scheduler.state_dict())
    built.destroy()
    return result


@pytest.fixture
def saved(ranks, tmp_path):
    wanted = ranks(cases.save_after, 2, str(tmp_path), cases.config(2, 2), 3)
    return str(tmp_path), wanted


def test_added_and_removed_parameters(ranks, saved):
    path, wanted = saved
    _, _, error, _, _ = ranks(try_load, 2, path, cases.config(3, 2), 1)[0]
    assert "not in the checkpoint: blocks.3.0.weight, blocks.3.0.bias" in error and "load_module_strict=False" in error
    before, now, error, said, _ = ranks(try_load, 2, path, cases.config(3, 2), 1, load_module_strict=False)[0]
    assert error is None and "blocks.3.3.bias; the rest was loaded" in said[0]
    for name, value in now["weights"].items():
        assert torch.equal(value, wanted[0]["weights"].get(name, before[name])), name
    assert "blocks.3.0.weight/step" not in now["scalars"] and now["scalars"]["blocks.0.0.weight/step"] == 3
    _, _, error, _, _ = ranks(try_load, 2, path, cases.config(1, 2), -1)[0]
    assert "not in the model: blocks.2.0.weight" in error
    _, now, error, _, _ = ranks(try_load, 2, path, cases.config(1, 2), -1, load_module_strict=False)[0]
    assert error is None and torch.equal(now["weights"]["embed.weight"], wanted[0]["weights"]["embed.weight"])


def test_an_added_parameter_trains_on_from_nothing(ranks, saved):
    """It has seen no steps, so it cannot share a run with those that have."""
    path, _ = saved
    for steps in ranks(train_with_more, 2, path, cases.config(2, 2)):
        assert set(steps.values()) <= {1.0, 4.0} and len(set(steps.values())) == 2


def train_with_more(path, settings):
    built = cases.engine(settings, extra=1)
    built.load_checkpoint(path, load_module_strict=False)
    cases.train(built, 4)
    found = {name: value for name, value in cases.contents(built)["scalars"].items() if name.endswith("/step")}
    assert all((value == 1.0) == name.startswith("blocks.3") for name, value in found.items())
    built.destroy()
    return found


def test_another_shape(ranks, tmp_path):
    error = ranks(shapes, 1, str(tmp_path))[0]
    assert "parameter 'weight' has the shape (3, 2) in the model, (2, 3) in the checkpoint" in error


def shapes(path):
    settings = Setup().config(0)
    shardline.initialize(model=nn.Linear(3, 2), config=settings)[0].save_checkpoint(path)
    try:
        shardline.initialize(model=nn.Linear(2, 3), config=settings)[0].load_checkpoint(path)
    except CheckpointError as error:
        return str(error)


def test_another_optimizer_takes_the_weights_only(ranks, saved):
    path, wanted = saved
    other = cases.config(3, 2) | {"optimizer": {"type": "SGD", "params": {"lr": 0.5}}}
    _, now, error, said, _ = ranks(try_load, 2, path, other)[0]
    assert error is None and "optimizer AdamW, and this job has SGD: the weights were loaded" in said[0]
    assert all(
        torch.equal(value, wanted[0]["weights"][name]) for name, value in now["weights"].items() if name != "norm"
    )
    assert not now["pieces"] and now["counters"] == wanted[0]["counters"]


def test_what_can_be_left_out(ranks, saved):
    path, wanted = saved
    _, now, _, _, schedule = ranks(try_load, 2, path, cases.config(0, 2), load_module_only=True)[0]
    assert torch.equal(now["weights"]["scale"], wanted[0]["weights"]["scale"])
    assert now["counters"]["global_steps"] == 0 and not now["pieces"] and now["loader"]["batch"] == 0
    assert schedule["last_epoch"] == 0
    _, now, _, _, schedule = ranks(try_load, 2, path, cases.config(0, 2), load_optimizer_states=False)[0]
    assert not now["pieces"] and now["counters"] == wanted[0]["counters"] and schedule["last_epoch"] == 3
    _, now, _, _, schedule = ranks(try_load, 2, path, cases.config(0, 2), load_lr_scheduler_states=False)[0]
    assert now["pieces"] and schedule["last_epoch"] == 0
    _, now, _, _, _ = ranks(try_load, 2, path, cases.config(0, 2), load_data_position=False)[0]
    assert now["loader"]["batch"] == 0


def test_a_changed_unit_size(ranks, saved):
    path, wanted = saved
    settings = cases.config(3, 2)
    settings["zero_optimization"] = {"stage": 3, "unit_min_numel": 5000, "stage3_param_persistence_threshold": 10_000}
    results = [result[1] for result in ranks(try_load, 2, path, settings)]
    ours, theirs = cases.whole(results), cases.whole(wanted)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_memory_formats_are_stored_as_they_are_and_read_as_needed(ranks, tmp_path):
    assert all(ranks(formats, 2, str(tmp_path)))


def formats(path):
    settings = Setup().config(3)

    def build(last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(5, 7, 3), nn.Conv2d(7, 5, 3))
        model = model.to(memory_format=torch.channels_last) if last else model
        return shardline.initialize(model=model, config=settings)[0]

    def moments(built):
        state = {}
        for piece in shardline.sharding.fragments.local_fragments(built.trainables.layout.runs, built.optimizer):
            state[piece.name, piece.start] = piece.state["exp_avg"].clone()
        return state

    first = build(True)
    first.backward(first(torch.rand(4, 5, 9, 9)).square().mean())
    first.step()
    first.save_checkpoint(path)
    contiguous, again = build(False), build(True)
    contiguous.load_checkpoint(path)
    contiguous.save_checkpoint(path, tag="contiguous")
    again.load_checkpoint(path, tag="contiguous")
    wanted, there = first.full_state_dict(), contiguous.full_state_dict()
    same = all(torch.equal(wanted[name], there[name]) for name in wanted)
    ours, theirs = moments(first), moments(again)
    return same and ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# -- optimizers that see whole parameters, frozen and unfrozen parameters ----------------------------------------------


@pytest.mark.parametrize("name", ["Adafactor", "Muon", "SGD", "NAdam", "Lamb"])
def test_any_kind_of_optimizer_state(ranks, tmp_path, name):
    """State with shapes of its own (Adafactor) moves between stages and numbers of ranks as the rest does."""
    options = {"lr": 0.01, "momentum": 0.9} if name == "SGD" else {"lr": 0.01}
    settings = {"train_batch_size": 12, "optimizer": {"type": name, "params": options},
                "zero_optimization": {"unit_min_numel": 1, "stage3_param_persistence_threshold": 0}}  # fmt: skip
    straight = ranks(matrices, 2, None, settings | {"zero_optimization": {**settings["zero_optimization"], "stage": 2}},
                     2, 4, str(tmp_path))  # fmt: skip
    for world, stage in ((2, 2), (3, 3), (1, 0)):
        zero = {**settings["zero_optimization"], "stage": stage}
        resumed = ranks(matrices, world, str(tmp_path), settings | {"zero_optimization": zero}, 2, 4, None)
        for key, value in straight[0].items():
            torch.testing.assert_close(resumed[0][key], value, rtol=1e-5, atol=1e-6)
            if (world, stage) == (2, 2):
                assert torch.equal(resumed[0][key], value)


def matrices(load, settings, at, steps, save):
    """Train matrices only; every step has a global batch of its own that does not depend on the world."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Tanh(), nn.Linear(20, 12, bias=False))
    built = shardline.initialize(model=model, config=settings)[0]
    if load:
        built.load_checkpoint(load)
        assert built.global_steps == at
    rank, world = built.comm.data.rank, built.comm.data.size
    while built.global_steps < steps:
        if save and built.global_steps == at:
            built.save_checkpoint(save)
        data = torch.randn(12, 12, generator=torch.Generator().manual_seed(built.global_steps))
        mine = data[rank * 12 // world : (rank + 1) * 12 // world]
        built.backward((built(mine) - mine).square().mean())
        built.step()
    state = built.full_state_dict()
    built.destroy()
    return state


def test_frozen_and_unfrozen_parameters_resume_bitwise(ranks, tmp_path):
    """States of different ages cannot share a run, and that of a frozen parameter waits."""
    settings = cases.config(2, 2)
    straight = ranks(unfreeze, 2, None, str(tmp_path), settings)
    resumed = ranks(unfreeze, 2, str(tmp_path), None, settings)
    for one, other in zip(straight, resumed, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    for stage, world in ((3, 1), (0, 3)):
        other = ranks(unfreeze, world, str(tmp_path), None, cases.config(stage, world))[0]
        assert other.keys() == straight[0].keys()


def unfreeze(load, save, settings):
    built = cases.engine(settings)
    late, early = built.module.blocks[0][0].weight, built.module.blocks[1][0].weight
    if load is None:
        cases.train(built, 2)
        late.requires_grad_(False)
        cases.train(built, 4)
        late.requires_grad_(True)
        early.requires_grad_(False)
        cases.train(built, 6)
        built.save_checkpoint(save)
    else:
        early.requires_grad_(False)
        built.load_checkpoint(load)
    early.requires_grad_(True)
    cases.train(built, 8)
    state = built.full_state_dict()
    built.destroy()
    return state
