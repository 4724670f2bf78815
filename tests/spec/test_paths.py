"""Paths: at stage 3 every rank may run a path of its own, in each step another, and trains as at stage 0, bit by bit.

Blocks are skipped, repeated, taken in another order or left early; by some ranks, in some steps, in evaluations.
"""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.harness import Setup, assert_close, assert_identical, assert_ranks_agree, check_against_twin, start
from tests.models import regression

WIDTH, BLOCKS = 32, 4
STEPS = 7


class Routed(nn.Module):
    """Blocks of different sizes, in the order of ``path``; a gate that is used before each of them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH + 8 * i), nn.Tanh(), nn.Linear(WIDTH + 8 * i, WIDTH))
            for i in range(BLOCKS)
        )
        self.head = nn.Linear(WIDTH, WIDTH)
        self.aux = torch.zeros(())

    def forward(self, x, path, how="plain"):
        self.aux = torch.zeros(())
        for i in path:
            block = self.blocks[i]
            y = torch.sigmoid(self.gate(x))
            y = checkpoint(block, y, use_reentrant=False) if how == "recomputed" else block(y)
            if how == "auxiliary":
                self.aux = self.aux + y.square().mean()
            x = x + y
        if how == "inner" and torch.is_grad_enabled():
            entry = torch.ones_like(x).requires_grad_()
            (slope,) = torch.autograd.grad(self.head(entry).square().sum(), entry, create_graph=True)
            x = x + 0.01 * slope
        return self.head(x)


def paths_of(seed, world, alike):
    """Indexed [step][forward][rank]; ``alike``: how often all ranks take one path."""
    rng = random.Random(seed)

    def path():
        found = [i for i in range(BLOCKS) if rng.random() < 0.75]
        if rng.random() < 0.3:
            rng.shuffle(found)
        if found and rng.random() < 0.3:
            found.insert(rng.randint(0, len(found)), rng.choice(found))
        return found

    usual = list(range(BLOCKS))
    return [
        [[usual if same else path() for _ in range(world)] for same in (rng.random() < alike, rng.random() < alike)]
        for _ in range(STEPS)
    ]


def train_on(config, seed, alike, how, world):
    """State, outputs of evaluations, and how often this rank refused."""

    rank, seen = dist.get_rank(), []
    engine = start(Routed, config)
    for number, (training, evaluation) in enumerate(paths_of(seed, world, alike)):
        for micro in range(engine.gradient_accumulation_steps()):
            x, y = regression(2, width=WIDTH, seed=100 * number + 10 * micro + rank)
            out = engine(x, training[(rank + micro) % world], how)
            loss = (out - y).square().mean() + 0.1 * engine.module.aux
            if how == "two forwards":
                loss = loss + (engine(y, evaluation[rank]) - x).square().mean()
            engine.backward(loss)
            with torch.no_grad():
                seen.append(engine(x, evaluation[rank]))
            engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return state, seen


def both(situations, world):
    found = []
    for setup, seed, alike, how in situations:
        found.append([train_on(setup.config(stage), seed, alike, how, world) for stage in (0, 3)])
    return found


ROOMS = [{}, {"stage3_max_live_parameters": 0}, {"stage3_prefetch_bucket_size": 0}, {"reshard_after_forward": False}]
HOW = ["plain", "recomputed", "auxiliary", "inner", "two forwards"]


def situations(alike, rooms=ROOMS):
    return [
        (Setup(optimizer="SGD", accumulation=1 + (i + j) % 2, zero=zero), 10 * i + j, alike, how)
        for i, zero in enumerate(rooms)
        for j, how in enumerate(HOW)
    ]


def compare(results, situations, *, exact):
    """``exact``: without accumulation, in which stages differ by the rounding of sums."""
    for rank_results, (setup, seed, alike, how) in zip(zip(*results, strict=True), situations, strict=True):
        for (whole, outputs), (sharded, found) in rank_results:
            same = exact and setup.accumulation == 1
            try:
                assert_identical(sharded, whole) if same else assert_close(sharded, whole)
                for a, b in zip(found, outputs, strict=True):
                    torch.testing.assert_close(
                        a, b, **({"rtol": 0, "atol": 0} if same else {"rtol": 1e-4, "atol": 1e-5})
                    )
            except AssertionError as error:
                raise AssertionError(f"{setup.zero} seed {seed} alike {alike} {how}: {error}") from error
        assert_ranks_agree([sharded for _, (sharded, _) in rank_results])


def test_a_path_of_its_own_for_each_rank_and_step(ranks):
    cases = situations(alike=0.0)
    compare(ranks(both, 2, cases, 2, timeout=110), cases, exact=True)


def test_three_ranks(ranks):
    cases = situations(alike=0.0, rooms=ROOMS[:1])
    compare(ranks(both, 3, cases, 3, timeout=110), cases, exact=False)


def train_after_agreement(config, plan):
    """Paths of a plan, in which None is not a step; the state, what was refused, what it cost, and steps skipped."""
    from shardline.errors import DisagreementError

    rank, engine, said = dist.get_rank(), start(Routed, config), None
    asked = []
    negotiation = engine.trainables.schedule._negotiation
    gather, negotiation._all_gather_ints = negotiation._all_gather_ints, lambda row: (asked.append(1), gather(row))[1]
    counts = []
    try:
        for number, each in enumerate(plan):
            if each is None:
                continue
            before, gathers = len(asked), engine.comm.log.elements["gather"]
            x, y = regression(2, width=WIDTH, seed=number + 50 * rank)
            engine.backward((engine(x, each[rank]) - y).square().mean())
            engine.step()
            counts.append((len(asked) - before, engine.comm.log.elements["gather"] - gathers))
    except DisagreementError as error:
        said = str(error)
        return None, said, counts, None
    state, skipped = engine.full_state_dict(), engine.skipped_steps
    engine.destroy()
    return state, said, counts, skipped


USUAL = [0, 1, 2, 3]


def test_alike_ranks_tell_each_other_nothing_from_the_second_step_on(ranks):
    config = Setup(optimizer="SGD").config(3)
    for _, _, counts, _ in ranks(train_after_agreement, 2, config, [[USUAL, USUAL]] * 4):
        assert [asked > 0 for asked, _ in counts] == [True, False, False, False]
        assert counts[1][1] == counts[2][1] == counts[3][1] <= counts[0][1]


@pytest.mark.parametrize("surprise", [[0, 1, 3], [3, 2, 1, 0], [2, 0, 3], [], [1], [2, 3, 1]], ids=str)
def test_a_surprise_after_ranks_were_alike(ranks, surprise):
    plan = [[USUAL, USUAL]] * 3 + [[USUAL, surprise]] + [[USUAL, USUAL]] * 3
    setup = Setup(optimizer="SGD")
    late = "late" in ranks.ways
    sharded = ranks(train_after_agreement, 2, setup.config(3), plan, timeout=30)
    jumped = sharded[0][3] > 0
    assert not jumped or (late and surprise != sorted(surprise)), "what comes in order has no late gradients"
    if jumped:  # ahead, in a backward: late gradients, which only a verdict that is read at once can save
        plan[3] = None
    whole = ranks(train_after_agreement, 2, setup.config(0), plan)
    for (expected, _, _, _), (state, said, counts, skipped) in zip(whole, sharded, strict=True):
        assert said is None and skipped == jumped
        assert_identical(state, expected)
        negotiated = [0, 4 + late]  # a step after all have heard
        assert [number for number, (asked, _) in enumerate(counts) if asked] == negotiated


class TwoLosses(nn.Module):
    """A trunk under two heads, of which a forward uses one: a block of its own leads to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(WIDTH, WIDTH)
        self.heads = nn.ModuleList(
            [nn.Linear(WIDTH, 1), nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))]
        )

    def forward(self, x, head):
        return self.heads[head](torch.tanh(self.trunk(x)))


def alternating(n, seed, alike):
    """The batches that two ranks get in turn: both change the loss in each micro-step, to the same one or not."""
    micro, rank = divmod(seed - 1, 2)
    return *regression(n, width=WIDTH, seed=seed), torch.tensor((micro + (0 if alike else rank)) % 2)


def loss_in_turn(call, module, batch):
    x, y, head = batch
    out = call(x, int(head)).float()
    return out.square().mean() if int(head) == 0 else (out - y).abs().mean()


@pytest.mark.parametrize("transport", ["shared", "gloo"])
@pytest.mark.parametrize("accumulation", [2, 4])
@pytest.mark.parametrize("alike", [True, False], ids=["alike", "each its own"])
def test_losses_that_alternate_between_micro_steps(ranks, alike, accumulation, transport):
    more = {"communication_transport": "gloo"} if transport == "gloo" else {}
    for dtype in ("fp32", "bf16"):
        setup = Setup(dtype, "SGD", accumulation=accumulation, clip=0.5, more=more)
        make = partial(alternating, alike=alike)
        check_against_twin(ranks, TwoLosses, loss_in_turn, make, stages=[0, 3], setup=setup, steps=4)
