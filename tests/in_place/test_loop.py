"""A plain loop with one changed line: the same weights, losses and optimizer state as without it, at every stage."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import shardline
from tests.harness import assert_identical, seeded
from tests.in_place.loops import STAGES, assert_same, averaged, config, sharded
from tests.models import Mlp, regression

STEPS, MICRO = 3, 2


def batch(step, micro):
    return regression(4, seed=100 * step + 10 * micro + dist.get_rank() + 1)


def loop(shard, kind=torch.optim.AdamW, schedule="after", **options):
    """Accumulation, clipping by the configuration's absence, groups, a scheduler: nothing in it knows an engine."""
    model = seeded(Mlp)
    biases = [param for name, param in model.named_parameters() if name.endswith("bias")]
    others = [param for name, param in model.named_parameters() if not name.endswith("bias")]
    optimizer = kind([{"params": others}, {"params": biases, "lr": 3e-3}], lr=1e-2, **options)

    def make_schedule():
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))

    schedulers = [make_schedule()] if schedule == "before" else []
    engine = shard(model, optimizer)
    schedulers += [make_schedule()] if schedule == "after" else []
    losses, rates = [], []
    for step in range(STEPS):
        for micro in range(MICRO):
            x, y = batch(step, micro)
            loss = F.mse_loss(model(x), y) / MICRO
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert [p for group in optimizer.param_groups for p in group["params"]] == others + biases
    return engine, model, optimizer, losses, rates


def loops(stages):
    """The plain loop, and the same in place at each of ``stages``: what each left behind."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind, schedule, options in (
            (torch.optim.AdamW, "after", {"eps": 1e-4}),
            (torch.optim.SGD, "before", {"momentum": 0.9}),
        ):
            engine, _, optimizer, losses, rates = loop(averaged, kind, schedule, **options)
            want = engine.full_state_dict(), losses, rates, optimizer.state_dict()
            for stage in stages:
                engine, _, optimizer, losses, rates = loop(sharded(stage), kind, schedule, **options)
                state = engine.full_optimizer_state_dict()
                found.append((stage, want, (engine.full_state_dict(), losses, rates, state)))
                assert (engine.global_steps, engine.micro_steps) == (STEPS, STEPS * MICRO)
                assert engine.global_samples == STEPS * MICRO * dist.get_world_size()
                engine.destroy()
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_a_loop_with_one_changed_line(ranks, world):
    for found in ranks(loops, world, STAGES):
        for stage, want, got in found:
            assert_same(got[:3], want[:3], path=f"stage {stage}")
            assert_same(
                {key: dict(sorted(value.items())) for key, value in got[3]["state"].items()},
                {key: dict(sorted(value.items())) for key, value in want[3]["state"].items()},
                1e-4,
                f"stage {stage}",
            )
            assert [group["params"] for group in got[3]["param_groups"]] == [
                group["params"] for group in want[3]["param_groups"]
            ]


# -- the same bits as initialize --------------------------------------------------------------------------------------


def side_by_side(stage, dtype):
    more = {dtype: {"enabled": True}} if dtype != "fp32" else {}
    ends = []
    for in_place in (True, False):
        model = seeded(Mlp)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        if in_place:
            engine = shardline.shard(model, optimizer, config(stage, **more))
        else:
            engine, *_ = shardline.initialize(model=model, optimizer=optimizer, config=config(stage, **more))
        for step in range(STEPS):
            x, y = batch(step, 0)
            if in_place:
                F.mse_loss(model(x).float(), y).backward()
                optimizer.step()
            else:
                engine.backward(F.mse_loss(engine(x).float(), y))
                engine.step()
        ends.append(engine.full_state_dict())
        engine.destroy()
    return ends


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_bits_as_initialize(ranks, dtype):
    for stage in STAGES:
        for one, other in ranks(side_by_side, 2, stage, dtype):
            assert_identical(one, other)


# -- the optimizer's state --------------------------------------------------------------------------------------------


def a_plain_start():
    """A plain loop's model and optimizer after two steps: what ``torch.save`` would hold."""
    model = seeded(Mlp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        x, y = regression(4, seed=step)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return model, optimizer


def go_on(model, optimizer):
    for step in range(2, 4):
        optimizer.zero_grad()
        x, y = regression(4, seed=step)
        F.mse_loss(model(x), y).backward()
        optimizer.step()


def to_and_fro(stage, how):
    model, optimizer = a_plain_start()
    if how == "held":  # the optimizer itself goes on
        engine = shardline.shard(model, optimizer, config(stage))
    else:  # a checkpoint is loaded
        saved = optimizer.state_dict()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5.0)
        engine = shardline.shard(model, optimizer, config(stage))
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 1e-2
    go_on(model, optimizer)
    weights, state = engine.full_state_dict(), engine.full_optimizer_state_dict(rank0_only=True)
    alone = None
    if dist.get_rank() == 0:
        try:
            alone = optimizer.state_dict()
        except shardline.OptimizerError as error:
            alone = str(error)
    engine.destroy()
    return weights, state, alone


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("how", ["held", "loaded"])
def test_a_plain_optimizer_goes_on_in_place_and_back(ranks, world, how):
    model, optimizer = a_plain_start()
    go_on(model, optimizer)
    want = optimizer.state_dict()
    for stage in STAGES:
        (weights, state, alone), *others = ranks(to_and_fro, world, stage, how)
        assert all(not other[1] for other in others)
        assert_same(weights, dict(model.state_dict()))
        assert_same({n: {k: s[k] for k in want["state"][n]} for n, s in state["state"].items()}, want["state"])
        back = torch.optim.AdamW(seeded(Mlp).parameters(), lr=5.0)
        back.load_state_dict(state)  # into a plain optimizer, which knows what is in it
        assert back.param_groups[0]["lr"] == 1e-2
        if stage == 0 or world == 1:
            assert_same({n: {k: s[k] for k in want["state"][n]} for n, s in alone["state"].items()}, want["state"])
        else:
            assert "engine.full_optimizer_state_dict()" in alone
