"""Where the host learns a step's verdict one step late, a run tells and does what one that reads at once does.

Steps with gradients that are not finite lie at random places; between steps there are questions by one rank, saves and
resumes. The rates of all updates are also those of a plain torch optimizer whose scheduler steps when a step counts.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau as Plateau

from tests.conftest import late_verdict
from tests.harness import Setup, start
from tests.models import Mlp, regression

ASKED: list[Any] = []
"""The engine that trains, for a scheduler that asks it."""

SCHEDULES: dict[str, Any] = {
    "WarmupDecayLR": {"total_num_steps": 9, "warmup_num_steps": 4, "warmup_max_lr": 0.02, "warmup_type": "linear"},
    "OneCycle": {"cycle_min_lr": 1e-3, "cycle_max_lr": 1e-2, "cycle_first_step_size": 3, "decay_step_size": 2,
                 "decay_lr_rate": 0.1, "decay_mom_rate": 0.05},
    "OneCycleLR": {"max_lr": 0.02, "total_steps": 40},
    "LambdaLR": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n)),
    "SequentialLR": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
         torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[3],
    ),
    "ReduceLROnPlateau": lambda optimizer: Plateau(optimizer, factor=0.5, patience=1),
    "asks": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: 1 / (1 + n + [engine.skipped_steps for engine in ASKED].count(-1))
    ),
    "no state": lambda optimizer: Halved(optimizer),
}  # fmt: skip


class Halved:
    """A scheduler of the user's whose steps cannot be undone."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0

    def step(self) -> None:
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.75


def make_plan(seed: int, *, saves: bool = True, length: int = 12) -> list[tuple[bool, str]]:
    """Per step: whether its gradients are finite, and what follows it."""
    draw = random.Random(seed)
    actions = ["", "", "ask", "save", "resume"] if saves else ["", "", "ask"]
    return [(draw.random() < 0.6, draw.choice(actions)) for _ in range(length)]


def build(config: dict[str, Any], schedule: str) -> Any:
    made = SCHEDULES[schedule]
    ASKED.clear()
    if callable(made):
        engine = start(Mlp, config, lr_scheduler=made)
    else:
        engine = start(Mlp, config | {"scheduler": {"type": schedule, "params": made}})
    ASKED.append(engine)
    return engine


def rates_of(optimizer: torch.optim.Optimizer) -> list[tuple[float, Any]]:
    return [(float(group["lr"]), group.get("betas")) for group in optimizer.param_groups]


def lr_kwargs(schedule: str, number: int) -> dict[str, Any]:
    return {"lr_kwargs": {"metrics": 1.0 + number}} if schedule == "ReduceLROnPlateau" else {}


def follow(plan: list[tuple[bool, str]], config: dict[str, Any], schedule: str, folder: str) -> dict[str, Any]:
    """Train by ``plan``: the rates at each update, what was told, answered and saved, and the weights."""
    from shardline.checkpoint.format.manifest import read_manifest
    from shardline.sharding.step import Update

    rank, world = dist.get_rank(), dist.get_world_size()
    rates, told, answers, saved = [], [], [], []
    apply = Update.apply

    def listen(event: Any) -> None:
        kind = type(event).__name__
        if kind == "StepDone":
            told.append((kind, event.step, float(event.loss), event.lr, float(event.grad_norm), event.samples))
        elif kind == "StepSkipped":
            told.append((kind, event.step, event.reason))

    def note_rates(self: Update, *args: Any, **kwargs: Any) -> None:
        rates.append(rates_of(self.optimizer))
        apply(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Update, "apply", note_rates)
        engine = build(config, schedule)
        engine.events.subscribe(listen)
        for number, (finite, action) in enumerate(plan):
            for micro in range(engine.gradient_accumulation_steps()):
                x, y = (each.to(engine.device) for each in regression(4, seed=number * 100 + micro * 10 + rank))
                loss = F.mse_loss(engine(x), y)
                engine.backward(loss if finite or rank else loss * float("inf"))
                engine.step(**lr_kwargs(schedule, number))
            if action == "ask" and rank == world - 1:
                counts = engine.was_step_applied(), engine.skipped_steps, engine.global_samples, engine.global_steps
                answers.append((number, *counts, engine.get_lr(), str(float(engine.get_global_grad_norm()))))
            if action in ("save", "resume"):
                engine.save_checkpoint(folder, f"after{number}")
                manifest = read_manifest(Path(folder) / f"after{number}")
                saved.append((number, manifest.counters, manifest.scheduler, manifest.optimizer))
            if action == "resume":
                engine.destroy()
                engine = build(config, schedule)
                engine.events.subscribe(listen)
                engine.load_checkpoint(folder)
        weights = engine.full_state_dict()
        engine.destroy()
        ASKED.clear()
    return {"rates": rates, "told": told, "answers": answers, "saved": saved, "weights": weights}


def both(schedules: list[str], config: dict[str, Any], folder: str) -> list[Any]:
    found = []
    for seed, schedule in enumerate(schedules):
        plan = make_plan(seed, saves=schedule != "no state")
        at_once = follow(plan, config, schedule, f"{folder}/{schedule}")
        with pytest.MonkeyPatch.context() as patch:
            late_verdict(patch)
            late = follow(plan, config, schedule, f"{folder}/{schedule} late")
        found.append((plan, schedule, at_once, late))
    return found


def plain_rates(plan: list[tuple[bool, str]], config: dict[str, Any], schedule: str) -> list[Any]:
    """The rates of all updates, with a plain optimizer."""
    from shardline.optim import lr

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], **config["optimizer"]["params"])
    made = SCHEDULES[schedule]
    scheduler = made(optimizer) if callable(made) else lr.build(schedule, optimizer, made)
    rates = []
    for number, (finite, _) in enumerate(plan):
        rates.append(rates_of(optimizer))
        if finite:
            optimizer.step()
            scheduler.step(**lr_kwargs(schedule, number).get("lr_kwargs", {}))
    return rates


@pytest.mark.parametrize(("world", "stage", "accumulation"), [(1, 0, 1), (2, 2, 2), (2, 3, 1)])
def test_a_verdict_that_comes_late_changes_nothing(ranks, tmp_path, world, stage, accumulation) -> None:
    config = Setup(accumulation=accumulation, clip=0.5).config(stage)
    schedules = list(SCHEDULES) if stage == 2 else ["OneCycle", "LambdaLR"]
    for found in ranks(both, world, schedules, config, str(tmp_path), timeout=120):
        for plan, schedule, at_once, late in found:
            assert late["rates"] == at_once["rates"] == plain_rates(plan, config, schedule), schedule
            assert late["told"] == at_once["told"], schedule
            assert late["answers"] == at_once["answers"] and late["saved"] == at_once["saved"], schedule
            assert all(torch.equal(value, at_once["weights"][name]) for name, value in late["weights"].items())
            steps = [(step, kind == "StepDone") for kind, step, *_ in late["told"]]
            assert steps == [(number + 1, finite) for number, (finite, _) in enumerate(plan)], schedule


# --- what else a step may be ------------------------------------------------------------------------------------------


def listening(engine: Any) -> list[tuple[str, Any]]:
    told: list[tuple[str, Any]] = []
    engine.events.subscribe(lambda event: told.append((type(event).__name__, getattr(event, "step", None))))
    return told


def one(engine: Any, number: int, *, aside: bool = False) -> None:
    """A step; ``aside``: the head's weight is also used before the forward, so that this gradient comes last of all."""
    extra = engine.module.head.weight.square().sum() if aside else 0.0
    x, y = regression(4, seed=number * 10 + dist.get_rank())
    engine.backward(F.mse_loss(engine(x), y) + extra)
    engine.step()


def late_gradients(config: dict[str, Any], asides: str) -> Any:
    """Steps with "+" have an aside, at "|" a parameter is frozen; what was told, the counts, and what changed when."""
    with pytest.MonkeyPatch.context() as patch:
        late_verdict(patch)
        engine = start(Mlp, config)
        told, moved = listening(engine), []
        for number, mark in enumerate(asides):
            if mark == "|":
                engine.module.blocks[0].up.bias.requires_grad_(False)
                continue
            before = engine.full_state_dict()["head.weight"]
            one(engine, number, aside=mark == "+")
            moved.append(not torch.equal(before, engine.full_state_dict()["head.weight"]))
        skipped, weights = engine.skipped_steps, engine.full_state_dict()
        engine.destroy()
    return told, moved, skipped, weights


@pytest.mark.parametrize("stage", [1, 2])
def test_late_gradients_cost_at_most_the_first_step_that_has_them(ranks, stage) -> None:
    """None where the first step of a layout has them; all ranks hear of a later one. Then none is lost any more."""
    config = Setup().config(stage)
    for asides, lost in {"++.+": [], ".+++": [1], "+|+.+": [], ".|.++": [2]}.items():
        results = ranks(late_gradients, 2, config, asides)
        assert ranks(late_gradients, 1, config, asides)[0][2] == 0, "one rank has nothing to reduce"
        for told, moved, skipped, weights in results:
            steps = len(asides.replace("|", ""))
            assert [number for number in range(steps) if not moved[number]] == lost, asides
            assert told == [("StepSkipped" if n in lost else "StepDone", n + 1) for n in range(steps)], asides
            assert skipped == len(lost)
            assert all(torch.equal(value, results[0][3][name]) for name, value in weights.items())


def refused(config: dict[str, Any]) -> Any:
    """Steps that are none: options differ, or no rank has a backward. What is said, and what is left of them."""
    from shardline.errors import DisagreementError, UsageError

    with pytest.MonkeyPatch.context() as patch:
        late_verdict(patch)
        engine = start(Mlp, config | {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}})
        told, said = listening(engine), []
        one(engine, 0)
        one(engine, 1)
        place = engine.lr_scheduler.state_dict()
        for what in ("options", "no backward"):
            if what == "options":
                engine.optimizer.param_groups[0]["weight_decay"] += dist.get_rank()
                one(engine, 2)
                engine.optimizer.param_groups[0]["weight_decay"] = 0.5
            else:
                engine.step()
            try:
                one(engine, 3)
            except (DisagreementError, UsageError) as error:
                said.append(str(error))
            said.append((engine.global_steps, engine.global_samples, engine.lr_scheduler.state_dict() == place))
        one(engine, 4)
        engine.destroy()
    return said, told


def test_a_step_that_is_refused_late_leaves_nothing(ranks) -> None:
    for said, told in ranks(refused, 2, Setup().config(2)):
        first, after, second, again = said
        assert "weight_decay" in first and "the step before was not applied" in first
        assert "before this one was called without a backward" in second
        assert after == again == (2, 16, True)
        assert told == [("StepDone", 1), ("StepDone", 2), ("StepDone", 3)]


def hooked(config: dict[str, Any], kind: str) -> int:
    """How often a hook that comes with applied updates is called in three steps, of which the last is skipped."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        late_verdict(patch)
        engine = start(Mlp, config)
        if kind == "engine":
            engine.after_step(lambda fragments: calls.append(1))
        else:
            engine.optimizer.register_step_post_hook(lambda *_: calls.append(1))
        one(engine, 0)
        one(engine, 1)
        x, y = regression(4)
        engine.backward(F.mse_loss(engine(x), y) * float("nan"))
        engine.step()
        engine.destroy()
    return len(calls)


@pytest.mark.parametrize("kind", ["engine", "optimizer"])
def test_hooks_see_applied_updates_only(ranks, kind) -> None:
    assert ranks(hooked, 2, Setup().config(1), kind) == [2, 2]
