"""Gradients between backward and step: what a plain loop does to them means the same in place, at every stage."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import shardline
from tests.harness import seeded
from tests.in_place.loops import STAGES, assert_same, averaged, sharded
from tests.models import Mlp, regression


class Loop:
    """A model, its optimizer and what one line made of them."""

    def __init__(self, shard, seed=0):
        self.model = seeded(Mlp)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, eps=1e-4)
        self.engine = shard(self.model, self.optimizer)
        self.batches = iter(range(1, 100))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def loss(self, times=1.0):
        x, y = regression(4, seed=10 * next(self.batches) + dist.get_rank())
        return times * F.mse_loss(self.model(x), y)

    def backward(self, times=1.0):
        self.loss(times).backward()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


def clip_norm(loop):
    loop.backward(30.0)
    norm = torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 0.5)
    again = torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 1e3)
    loop.step()
    return norm.item(), again.item()


def clip_other_norms(loop):
    loop.backward(30.0)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in loop.model.parameters()], order) for order in (1.0, 3.0)]
    norms.append(torch.nn.utils.clip_grad_norm_(loop.model.head.parameters(), 0.1, float("inf")))
    loop.step()
    return [norm.item() for norm in norms]


def clip_by_engine(loop):
    loop.backward(30.0)
    clip = getattr(loop.engine, "clip_grad_norm_", None)
    norm = clip(0.5) if clip else torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 0.5)
    loop.step()
    return norm.item()


def clip_value(loop):
    loop.backward()
    loop.backward()
    torch.nn.utils.clip_grad_value_(loop.model.parameters(), 1e-3)
    loop.step()


def surgery(loop):
    """By hand, and a backward after it that adds to what was changed."""
    loop.backward()
    for param in loop.model.parameters():
        if param.grad is not None:
            param.grad.nan_to_num_()
            param.grad *= 0.5
            param.grad.clamp_(-1e-3, 1e-3)
    loop.backward()
    norms = [param.grad.norm().item() for param in loop.model.parameters()]
    loop.step()
    return norms


def by_data(loop):
    """Scripts of an older style: each layer's gradient is clipped by hand, through ``.data``."""
    loop.backward(30.0)
    norms = []
    for param in loop.model.parameters():
        norms.append(param.grad.data.norm(2).item())
        param.grad.data.mul_(min(1.0, 0.3 / (norms[-1] + 1e-6)))
        norms.append(param.grad.detach().norm().item())
        assert param.grad.data.shape == param.shape and not param.grad.detach().requires_grad
    loop.step()
    return norms


def some_forgotten(loop):
    loop.backward()
    loop.model.head.zero_grad()
    loop.model.blocks[0].up.weight.grad.zero_()
    loop.model.blocks[1].up.weight.grad = torch.full_like(loop.model.blocks[1].up.weight, 1e-3)
    loop.backward()
    loop.step()


def zeroed_anywhere(loop):
    loop.backward()
    loop.optimizer.zero_grad()
    loss = loop.loss()
    loop.optimizer.zero_grad(set_to_none=False)
    loss.backward()
    loop.optimizer.step()
    loop.optimizer.zero_grad()
    loop.backward()
    loop.model.zero_grad()
    loop.backward()
    loop.step()


def scaled(loop):
    """A GradScaler: unscaled by hand and clipped, then a step that it skips, then one that it makes alone."""
    norms = []
    for times in (1.0, float("inf"), 1.0):
        loop.scaler.scale(loop.loss(times)).backward()
        if times == 1.0 and not norms:
            loop.scaler.unscale_(loop.optimizer)
            norms.append(torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1).item())
        loop.scaler.step(loop.optimizer)
        loop.scaler.update()
        loop.optimizer.zero_grad()
    return norms, loop.scaler.get_scale()


def not_synced(loop):
    quiet = loop.engine.no_sync() if hasattr(loop.engine, "no_sync") else contextlib.nullcontext()
    with quiet:
        loop.backward()
        loop.backward()
    norm = torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1).item()
    loop.step()
    return norm


def by_closure(loop):
    def closure():
        loop.optimizer.zero_grad()
        loss = loop.loss()
        loss.backward()
        return loss

    loss = loop.optimizer.step(closure).item()
    loop.optimizer.zero_grad()
    return loss


def past_forward(loop):
    """A method and a module of the model, without its forward."""
    x, _ = regression(4, seed=dist.get_rank() + 7)
    loop.model.head(loop.model.encode(x)).square().mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(loop.model.blocks.parameters(), 0.01).item()
    loop.step()
    return norm


def hooked(loop):
    """The optimizer's own hooks are called around its step."""
    seen = []
    handles = [
        loop.optimizer.register_step_pre_hook(lambda *given: seen.append("before")),
        loop.optimizer.register_step_post_hook(lambda *given: seen.append("after")),
    ]
    loop.backward()
    loop.step()
    for handle in handles:
        handle.remove()
    return seen


def late(loop):
    """One backward that recomputes inside itself, and a loss on a weight beside it: gradients come at other times."""
    x, y = regression(4, seed=dist.get_rank() + 70)
    hidden = checkpoint(loop.model.encode, x.requires_grad_(), use_reentrant=True)
    loss = F.mse_loss(loop.model.head(hidden), y) + loop.model.head(x).square().mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1).item()
    loop.step()
    return norm


HANDLINGS = [clip_norm, clip_other_norms, clip_by_engine, clip_value, surgery, by_data, some_forgotten, zeroed_anywhere,
             scaled, not_synced, late, by_closure, past_forward, hooked]  # fmt: skip


def handled(stages):
    plain, found = Loop(averaged), []
    want = [(handling.__name__, handling(plain), plain.engine.full_state_dict()) for handling in HANDLINGS]
    for stage in stages:
        loop = Loop(sharded(stage))
        got = [(handling.__name__, handling(loop), loop.engine.full_state_dict()) for handling in HANDLINGS]
        found.append((stage, got, want))
        loop.engine.destroy()
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_what_a_loop_does_to_gradients(ranks, world):
    for found in ranks(handled, world, STAGES):
        for stage, got, want in found:
            for one, other in zip(got, want, strict=True):
                assert_same(one, other, 2e-5, f"stage {stage} {other[0]}")


def said_of(stage):
    loop = Loop(sharded(stage))
    loop.backward()
    said = []
    weight = loop.model.head.weight
    for use in (
        lambda: weight.grad + 1,
        lambda: weight.grad.clone(),
        lambda: weight.grad.mul_(torch.ones(weight.shape)),
        lambda: weight.grad.T,
    ):
        try:
            use()
            said.append(None)
        except shardline.UsageError as error:
            said.append(str(error))
    loop.step()
    none = weight.grad is None
    loop.engine.destroy()
    return said, none


def test_what_needs_the_elements_says_what_to_call(ranks):
    for stage in (0, 3):
        for said, none in ranks(said_of, 2, stage):
            assert none
            assert [sentence.split(": ")[0] for sentence in said] == ["add", "clone", "mul_", ".T"]
            for sentence in said:
                assert "engine.before_step" in sentence
                assert "engine.parameter('head.weight').full_grad()" in sentence
                assert "engine.clip_grad_norm_" in sentence
