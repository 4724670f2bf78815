"""What an engine keeps of one parameter, by name, between backward and step and after it: against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import shardline
from shardline.errors import UsageError
from tests.harness import Setup, seeded
from tests.in_place.loops import averaged, config

WIDTH = 6


class Net(nn.Module):
    """A weight that is used again outside of its module, so that a part of its gradient is late; a frozen module."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, WIDTH)) for _ in "ab")
        self.fixed = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        x = self.first(x)
        early = self.blocks[1][0].weight.square().sum() * 0.1
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=True)
        return self.last(self.fixed(x)).square().mean() + early


def rows(step, micro):
    seed = 100 * step + 10 * micro + dist.get_rank()
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed))


NAMES = ["first.bias", "blocks.1.0.weight", "blocks.0.2.weight", "last.weight"]


def same(got, want):
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def plainly(change):
    """Gradients, weights and moments of a plain loop, in the order in which the engine's are read."""
    model = seeded(Net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
    averaged(model, optimizer)
    seen = []
    for step in range(3):
        for micro in range(2):
            (model(rows(step, micro)) / 2).backward()
            seen.append({name: model.get_parameter(name).grad.clone() for name in NAMES})
        if change:
            for name in NAMES:
                model.get_parameter(name).grad.mul_(2).add_(0.01)
        optimizer.step()
        optimizer.zero_grad()
        for name in NAMES:
            param = model.get_parameter(name)
            seen.append([param.detach().clone(), *(optimizer.state[param][key].clone() for key in ("exp_avg", "step"))])
            if change:
                param.data.mul_(0.5)
                optimizer.state[param]["exp_avg"].add_(0.01)
    return seen


def by_name(stage, way, change):
    """The same through ``engine.parameter``; with ``change`` whole tensors and fragments are set."""
    model = seeded(Net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
    if way == "shard":
        engine = shardline.shard(model, optimizer, config(stage, gradient_accumulation_steps=2))
    else:
        more = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
        engine, *_ = shardline.initialize(model=model, optimizer=optimizer, config=config(stage, **more))
    found = [engine.parameter(name) for name in NAMES]
    assert engine.parameter(model.last.weight).name == "last.weight"
    seen = []
    for step in range(3):
        for micro in range(2):
            if way == "shard":
                (model(rows(step, micro)) / 2).backward()
            else:
                engine.backward(engine(rows(step, micro)))
                if micro == 0:
                    seen.append({one.name: one.full_grad() for one in found})
                    engine.step()
                    continue
            seen.append({one.name: one.full_grad() for one in found})
        if change:
            for one in found[:2]:
                one.set_full_grad(one.full_grad() * 2 + 0.01)
            for one in found[2:]:
                for piece in one.fragments():
                    piece.grad.mul_(2).add_(0.01)
        if way == "shard":
            optimizer.step()
        else:
            engine.step()
        for one in found:
            seen.append([one.full_master(), one.full_state("exp_avg"), one.full_state("step")])
            if change:
                one.set_full_master(one.full_master() * 0.5)
                if one in found[:2]:
                    one.set_full_state("exp_avg", one.full_state("exp_avg") + 0.01)
                else:
                    for piece in one.fragments():
                        piece.state["exp_avg"].add_(0.01)
    assert engine.parameter("fixed.weight").full_grad() is None
    same(engine.parameter("fixed.weight").full_master(), seeded(Net).fixed.weight)
    engine.destroy()
    return seen


def compared():
    for change in (False, True):
        want = plainly(change)
        for stage in (0, 1, 2, 3):
            for way in ("shard", "initialize"):
                got = by_name(stage, way, change)
                assert len(got) == len(want)
                for one, other in zip(got, want, strict=True):
                    pairs = [(one[n], other[n]) for n in NAMES] if isinstance(other, dict) else zip(one, other)  # noqa: B905
                    for ours, theirs in pairs:
                        same(ours, theirs)


@pytest.mark.parametrize("world", [1, 2])
def test_one_parameter_is_read_and_changed_by_name(ranks, world):
    ranks(compared, world)


def in_half(dtype):
    """Gradients have no loss scale, masters are fp32, and the weights are their rounding."""
    setup = Setup(dtype, "SGD")
    engine = shardline.initialize(model=seeded(lambda: nn.Linear(WIDTH, 4)), config=setup.config(3))[0]
    x = rows(0, 0)
    engine.backward(engine(x).float().mean())
    one = engine.parameter("weight")
    grad, master = one.full_grad(), one.full_master()
    total = x.to(engine.precision.compute).float().mean(0) / 4
    dist.all_reduce(total)
    torch.testing.assert_close(grad.float(), (total / dist.get_world_size()).expand(4, -1), rtol=2e-2, atol=1e-3)
    assert master.dtype is torch.float32
    one.set_full_master(master + 1e-5)
    assert torch.equal(one.full_master(), master + 1e-5)
    with engine.gathered_parameters():
        assert torch.equal(engine.module.weight, (master + 1e-5).to(engine.precision.compute))
    engine.step()
    engine.destroy()


def in_halves():
    in_half("bf16")
    in_half("fp16")


def test_masters_and_gradients_of_low_precision(ranks):
    ranks(in_halves, 2)


def said():
    found = []
    engine = shardline.initialize(model=seeded(Net), config=Setup().config(3))[0]
    for call in (
        lambda: engine.parameter("nothing"),
        lambda: engine.parameter("first.bias").set_full_grad(torch.zeros(2)),
        lambda: engine.parameter("fixed.weight").set_full_grad(torch.zeros(WIDTH, WIDTH)),
        lambda: engine.parameter("first.bias").set_full_state("exp_avg", torch.zeros(WIDTH)),
    ):
        try:
            call()
        except UsageError as error:
            found.append(str(error))
    engine.destroy()
    return found


def test_what_cannot_be_is_said(ranks):
    for found in ranks(said, 1):
        wanted = [
            "is not a parameter of this engine's model",
            "has the shape (6,)",
            "is not trained",
            "no state 'exp_avg'",
        ]
        assert [want in text for want, text in zip(wanted, found, strict=True)] == [True] * 4
