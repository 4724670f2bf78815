"""Saving, copying and evaluating in the middle of a loop: right, or a sentence that says what to call; never a hang."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import shardline
from tests.harness import seeded
from tests.in_place.loops import STAGES, assert_same, averaged, config, sharded
from tests.models import Mlp, regression


def train(model, optimizer, steps, seed=0):
    for step in range(steps):
        optimizer.zero_grad()
        x, y = regression(4, seed=seed + 10 * step + dist.get_rank())
        F.mse_loss(model(x.to(next(model.parameters()).dtype)).float(), y).backward()
        optimizer.step()


def begun(shard):
    model = seeded(Mlp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    engine = shard(model, optimizer)
    train(model, optimizer, 2)
    return engine, model, optimizer


def attempt(call):
    try:
        return call()
    except shardline.ShardlineError as error:
        return f"{type(error).__name__}: {error}"


def saved(what, *, weights_only=True):
    file = io.BytesIO()
    torch.save(what(), file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def rank_0_alone(stage):
    """``if rank == 0: torch.save(...)``, a copy and an evaluation, and a step after them."""
    engine, model, optimizer = begun(sharded(stage))
    found = {}
    if dist.get_rank() == 0:
        found["model"] = attempt(lambda: saved(model.state_dict))
        found["optim"] = attempt(lambda: saved(optimizer.state_dict))
        found["both"] = attempt(lambda: saved(lambda: {"model": model.state_dict(), "optim": optimizer.state_dict()}))
        found["copy"] = attempt(lambda: dict(copy.deepcopy(model).state_dict()))
        found["pickled"] = attempt(lambda: dict(saved(lambda: model, weights_only=False).state_dict()))
    train(model, optimizer, 1, seed=500)
    found["after"] = engine.full_state_dict()
    engine.destroy()
    return found


def plainly():
    engine, model, optimizer = begun(averaged)
    state = {"model": copy.deepcopy(model.state_dict()), "optim": copy.deepcopy(optimizer.state_dict())}
    train(model, optimizer, 1, seed=500)
    return state, engine.full_state_dict()


def in_order(state):
    return {number: dict(sorted(values.items())) for number, values in state["state"].items()}


@pytest.mark.parametrize("world", [1, 2])
def test_rank_0_saves_and_copies_alone(ranks, world):
    want, after = ranks(plainly, world)[0]
    for stage in STAGES:
        found, *others = ranks(rank_0_alone, world, stage)
        for each in (found, *others):
            assert_same(each["after"], after)
        if world == 1 or stage < 3:
            assert_same(dict(found["model"]), dict(want["model"]))
            assert_same(found["copy"], dict(want["model"]))
            assert_same(found["pickled"], dict(want["model"]))
        else:
            assert "engine.full_state_dict()" in found["model"]
            assert found["copy"].startswith("SealedError")
            assert "engine.full_state_dict()" in found["pickled"]
        if world == 1 or stage == 0:
            assert_same(in_order(found["optim"]), in_order(want["optim"]))
            assert_same(in_order(found["both"]["optim"]), in_order(want["optim"]))
        else:
            assert "engine.full_optimizer_state_dict()" in found["optim"]
            assert "engine.full_" in found["both"]


def rank_0_evaluates(stage, how):
    """``if rank == 0:`` an evaluation, and the loop goes on."""
    engine, model, optimizer = begun(sharded(stage))

    def go_on():
        loss = None
        if dist.get_rank() == 0:
            if how == "eval":
                model.eval()
            with torch.no_grad():
                x, y = regression(4, seed=3)
                loss = F.mse_loss(model(x), y).item()
            model.train()
        train(model, optimizer, 2, seed=500)
        return loss, engine.full_state_dict()

    found = attempt(go_on)
    attempt(engine.destroy)
    return found


def evaluated_plainly():
    _, model, optimizer = begun(averaged)
    with torch.no_grad():
        x, y = regression(4, seed=3)
        loss = F.mse_loss(model(x), y).item()
    train(model, optimizer, 2, seed=500)
    return loss, dict(model.state_dict())


@pytest.mark.parametrize("how", ["eval", "train"])
def test_rank_0_evaluates_alone(ranks, how):
    want = ranks(evaluated_plainly, 2)[0]
    for stage in (0, 1, 2):
        found, other = ranks(rank_0_evaluates, 2, stage, how)
        assert_same(found, want)
        assert_same(other[1], want[1])
    for said in ranks(rank_0_evaluates, 2, 3, how):
        assert said.startswith("DisagreementError") and "Every rank must" in said and "rank 1" in said


# -- groups and options -----------------------------------------------------------------------------------------------


def grown(shard):
    """The head is frozen, then joins as a group of its own; rates change by hand."""
    model = seeded(Mlp)
    model.head.requires_grad_(False)
    optimizer = torch.optim.SGD(model.blocks.parameters(), lr=0.1, momentum=0.9)
    engine = shard(model, optimizer)
    train(model, optimizer, 2)
    model.head.requires_grad_(True)
    if not isinstance(engine, shardline.Engine):
        for param in model.head.parameters():
            param.register_hook(engine._mean)
    optimizer.add_param_group({"params": model.head.parameters(), "lr": 0.02})
    optimizer.param_groups[0]["lr"] = 0.05
    train(model, optimizer, 2, seed=100)
    groups = [(group["lr"], len(group["params"]), group["momentum"]) for group in optimizer.param_groups]
    own = all(any(p is q for q in model.parameters()) for group in optimizer.param_groups for p in group["params"])
    weights = engine.full_state_dict()
    engine.destroy()
    return weights, groups, own


def test_groups_grow_in_place(ranks):
    want = ranks(grown, 2, averaged)
    for stage in (0, 2, 3):
        for got, other in zip(ranks(grown_at, 2, stage), want, strict=True):
            assert_same(got, other)


def grown_at(stage):
    return grown(sharded(stage))


def scheduled(folder, stage, *, resumed):
    """The schedule runs between the step and the save: what is saved is the rate of the next step."""
    model = seeded(Mlp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    engine = sharded(stage)(model, optimizer)
    for step in range(3):
        train(model, optimizer, 1, seed=1000 * step)
        scheduler.step()
        if step == 1:
            whole = engine.full_optimizer_state_dict()["param_groups"][0]["lr"]
            engine.save_checkpoint(folder)
            if resumed:
                optimizer.param_groups[0]["lr"] = 7.0
                engine.load_checkpoint(folder)
    found = engine.full_state_dict(), whole, optimizer.param_groups[0]["lr"]
    engine.destroy()
    return found


def test_a_rate_that_the_loop_has_set_is_saved(ranks, tmp_path):
    for stage in (0, 3):
        want = ranks(scheduled, 2, str(tmp_path / f"{stage}a"), stage, resumed=False)
        got = ranks(scheduled, 2, str(tmp_path / f"{stage}b"), stage, resumed=True)
        assert_same(got, want, 0.0)
        assert want[0][1:] == (1e-2 / 4, 1e-2 / 8)


# -- lower precision --------------------------------------------------------------------------------------------------


def in_half(stage, dtype):
    model = seeded(Mlp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    engine = shardline.shard(model, optimizer, config(stage, **{dtype: {"enabled": True}}))
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == "fp16", init_scale=2.0**8)
    told, losses = [], []
    engine.events.subscribe(lambda event: told.append(str(event)))
    x, y = regression(16, seed=dist.get_rank())
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    dtypes = {param.dtype for param in model.parameters()}
    engine.destroy()
    return losses, dtypes, [text for text in told if "Notice" in text]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_lower_precision_trains_in_place(ranks, dtype):
    for stage in (0, 3):
        for losses, dtypes, told in ranks(in_half, 2, stage, dtype):
            assert losses[-1] < 0.5 * losses[0]
            assert dtypes == {torch.bfloat16 if dtype == "bf16" else torch.float16}
            assert not told


def under_autocast(shard):
    model = seeded(Mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = shard(model, optimizer)
    for step in range(3):
        x, y = regression(4, seed=step + 10 * dist.get_rank())
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    weights = engine.full_state_dict()
    engine.destroy()
    return weights


def autocast_at(stages):
    return [under_autocast(averaged), *(under_autocast(sharded(stage)) for stage in stages)]


def test_autocast_in_the_loop_is_honoured(ranks):
    for want, *found in ranks(autocast_at, 2, (0, 2, 3)):
        for got in found:
            assert_same(got, want, 2e-3)


# -- what cannot be ---------------------------------------------------------------------------------------------------


def refused(config_, optimizer_of=None):
    model = seeded(Mlp)
    optimizer = (optimizer_of or (lambda m: torch.optim.SGD(m.parameters(), lr=0.1)))(model)
    return attempt(lambda: shardline.shard(model, optimizer, config_))


def refusals():
    return (
        refused({"scheduler": {"type": "WarmupLR", "params": {}}}),
        refused({"torch_autocast": {"enabled": True}}),
        refused({}, lambda model: "AdamW"),
        refused({}, lambda model: torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)),
    )


def test_what_belongs_to_the_loop_is_refused_in_the_configuration(ranks):
    for scheduler, autocast, name, foreign in ranks(refusals, 1):
        assert scheduler.startswith("ConfigError") and "Attach one to the optimizer" in scheduler
        assert autocast.startswith("ConfigError") and "torch.autocast" in autocast
        assert name.startswith("UsageError") and "torch.optim.Optimizer" in name
        assert foreign.startswith("OptimizerError") and "not a parameter of the model" in foreign
