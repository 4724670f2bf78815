"""Graphs that no module's hooks see being built: inside gathered_parameters, in other methods, under torch.func."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu

from shardline.errors import SealedError
from tests.harness import Setup, check_against_twin, is_whole, seeded, spread, start, train_twin
from tests.models import Block, Mlp, mse, regression


def whole(call, **kwargs):
    """The engine's weights made whole; the twin's are."""
    return getattr(call, "gathered_parameters", lambda **_: contextlib.nullcontext())(**kwargs)


# --- inside gathered_parameters ---------------------------------------------------------------------------------------


def penalty(module):
    """What saves the weights themselves, a transposed view, and a product of two."""
    first, second = module.blocks[0].up.weight, module.blocks[1].down.weight
    return 1e-2 * (first.square().sum() + second.t().pow(3).sum() + (first @ second).float().square().mean())


def penalty_beside(call, module, batch):
    loss = mse(call, module, batch)
    with whole(call):
        return loss + penalty(module)


def penalty_around(call, module, batch):
    with whole(call, write=True):
        return mse(call, module, batch) + penalty(module)


def penalty_before(call, module, batch):
    with whole(call), save_on_cpu():
        extra = penalty(module)
    with whole(call), whole(call):
        more = penalty(module)
    return mse(call, module, batch) + extra + more


@pytest.mark.parametrize("loss_of", [penalty_beside, penalty_around, penalty_before])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_graph_of_gathered_weights(ranks, loss_of, dtype):
    """Its backward comes when they are sharded again."""
    check_against_twin(ranks, Mlp, loss_of, regression, stages=(2, 3), setup=Setup(dtype, accumulation=2), steps=2)


def what_stays(config):
    engine = start(Mlp, config)
    with engine.gathered_parameters():
        loss = penalty(engine.module)
    after = [name for name, p in engine.module.named_parameters() if is_whole(p)]
    with engine.gathered_parameters(write=True), torch.no_grad():
        engine.module.blocks[0].up.weight.mul_(2)
    try:
        loss.backward()
    except RuntimeError as error:
        said = str(error)
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    engine.destroy()
    return after, said, hooks


def test_it_keeps_no_memory_and_knows_old_weights(ranks):
    for after, said, hooks in ranks(what_stays, 2, Setup().config(3)):
        assert after == [] and hooks is None
        assert "modified by an inplace operation" in said and "blocks.0.up.weight" in said


# --- other methods than forward ---------------------------------------------------------------------------------------


class Clip(nn.Module):
    """Weights of its own, used in methods, in a property, and in a function that a method calls."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.position = nn.Parameter(torch.randn(32) * 0.1)
        self.projection = nn.Parameter(torch.randn(32, 32) * 0.2)
        self.temperature = nn.Parameter(torch.ones(()))
        self.extra = nn.ParameterDict({"a": nn.Parameter(torch.randn(32) * 0.1)})

    @property
    def scale(self):
        return self.temperature.exp()

    def encode(self, x):
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        return self.project(x + self.extra["a"])

    def project(self, x):
        return self.scale * sum(part @ self.projection for part in (x, x.detach()))

    def forward(self, x):
        return self.encode(x)

    def norms(self):
        return [p.norm() for p in self.parameters()]


def by_method(call, module, batch):
    return F.mse_loss(module.encode(batch[0]), batch[1])


def by_forward(call, module, batch):
    return F.mse_loss(module.forward(batch[0]), batch[1])


def by_two(call, module, batch):
    loss = by_method(call, module, batch) + mse(call, module, batch)
    with torch.no_grad():
        module.encode(batch[0])
    return loss + 0.1 * module.project(batch[0]).square().mean()


@pytest.mark.parametrize("loss_of", [by_method, by_forward, by_two])
def test_any_method_works(ranks, loss_of):
    check_against_twin(ranks, Clip, loss_of, regression, stages=(0, 3), setup=Setup(accumulation=2), steps=2)


def reads(config):
    """What reads a sharded weight and is not a method that computes."""
    engine = start(Clip, config)
    model, raised = engine.module, []
    ways = (
        lambda: model.position.sum(),
        lambda: penalty_of(model),
        lambda: model.state_dict(),
        lambda: model.double(),
    )
    for way in ways:
        try:
            way()
        except SealedError:
            raised.append(True)
    assert len(model.norms()) == len(list(model.parameters()))
    engine.destroy()
    return raised


def penalty_of(module):
    return module.position.square().sum()


def test_what_is_no_method_of_the_model_is_refused(ranks):
    """It may well happen on one rank alone, such as a print."""
    assert ranks(reads, 2, Setup().config(3)) == [[True] * 4] * 2


# --- torch.func -------------------------------------------------------------------------------------------------------


def jvp(call, module, batch):
    out, tangent = torch.func.jvp(call, (batch[0],), (batch[1],))
    return (out - batch[1]).square().mean() + tangent.square().mean()


def grad(call, module, batch):
    """Score matching: the gradient by the input is a part of the loss."""
    score = torch.func.grad(lambda x: call(x).tanh().sum())(batch[0])
    return (score - batch[1]).square().mean()


def jacrev(call, module, batch):
    return torch.func.jacrev(lambda x: call(x).tanh().sum(0))(batch[0][:2]).square().mean() + mse(call, module, batch)


def per_sample(call, module, batch):
    """vmap over grad: each sample's own."""
    scores = torch.func.vmap(torch.func.grad(lambda x: call(x[None]).tanh().sum()))(batch[0])
    return (scores - batch[1]).square().mean()


def vjp_and_plain(call, module, batch):
    out, pull = torch.func.vjp(call, batch[0])
    return mse(call, module, batch) + pull(torch.tanh(out))[0].square().mean()


def hessian_product(call, module, batch):
    x = batch[0]
    product = torch.func.jvp(torch.func.grad(lambda x: call(x).tanh().square().sum()), (x,), (batch[1],))[1]
    return product.square().mean()


TRANSFORMS = (jvp, grad, jacrev, per_sample, vjp_and_plain, hessian_product)


@pytest.mark.parametrize("loss_of", TRANSFORMS)
def test_transforms_around_the_engine(ranks, loss_of):
    check_against_twin(ranks, Mlp, loss_of, regression, stages=(2, 3), setup=Setup(accumulation=2), steps=2)


class Forces(Mlp):
    """Takes a transform inside of its forward."""

    def forward(self, x):
        return torch.func.grad(lambda x: super(Forces, self).forward(x).sum())(x)


def transforms_inside(config):
    notes = []
    engine, x = start(Forces, config), torch.ones(2, 32)
    for call in (lambda: engine(x), lambda: in_gathered(engine, x)):
        try:
            call()
        except RuntimeError as error:
            notes.append(" ".join(error.__notes__))
    with torch.no_grad():
        seen = in_gathered(engine, x)
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    engine.destroy()
    return notes, seen, hooks


def in_gathered(engine, x):
    with engine.gathered_parameters():
        return torch.func.grad(lambda w: (x @ w).square().sum())(engine.module.head.weight)


def test_a_transform_inside_of_a_forward_says_what_to_do(ranks):
    weight = seeded(Forces).head.weight.detach().requires_grad_()
    (expected,) = torch.autograd.grad((torch.ones(2, 32) @ weight).square().sum(), weight)
    for notes, seen, hooks in ranks(transforms_inside, 2, Setup().config(3)):
        assert len(notes) == 2 and all("torch.autograd.grad" in note and "stage 3" in note for note in notes)
        torch.testing.assert_close(seen, expected)
        assert hooks is None


@pytest.mark.parametrize("loss_of", [by_method, grad])
def test_a_second_backward_and_an_evaluation_between(ranks, loss_of):
    """What a graph holds stays until the step, whatever comes in between."""
    setup = Setup(accumulation=2)
    batches = spread(regression, 2, setup, 2)
    build = Clip if loss_of is by_method else Mlp
    _, expected = train_twin(build, lambda *given: 2 * loss_of(*given), batches, setup)
    for state, after in ranks(twice, 2, build, loss_of, batches, setup.config(3)):
        for name, value in expected["state"].items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)
        assert after == []


def twice(build, loss_of, batches, config):
    engine, rank = start(build, config), dist.get_rank()
    for window in batches:
        for micro in window:
            loss = loss_of(engine, engine.module, micro[rank])
            with torch.no_grad():
                engine(micro[rank][0])
            loss.backward(retain_graph=True)
            with torch.inference_mode():
                engine(micro[rank][0])
            engine.backward(loss)
            engine.step()
    after = [name for name, p in engine.module.named_parameters() if p.numel() > 1 and is_whole(p)]
    state = engine.full_state_dict()
    engine.destroy()
    return state, after


def without_a_graph(config):
    """How many parameters are whole: after a transform that leaves no graph, and after the forward that follows."""
    engine = start(Mlp, config)
    x = torch.ones(2, 32)
    with torch.no_grad():
        torch.func.vmap(torch.func.grad(lambda x: engine(x).sum()))(x)
    during = sum(map(is_whole, engine.module.parameters()))
    with torch.no_grad():
        engine(x)
    after = sum(map(is_whole, engine.module.parameters()))
    engine.destroy()
    return during, after


def test_what_no_graph_needs_goes_with_the_next_forward(ranks):
    for during, after in ranks(without_a_graph, 2, Setup().config(3)):
        assert during == len(list(Mlp().parameters())) and after == 0
