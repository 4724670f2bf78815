"""Windows whose backwards differ, on all ranks alike: a GAN, heads in turn, several forwards, gradients of inputs.

At stage 3 a backward needs whole weights in an order that ranks recorded in an earlier one. One that needs others is
not to be held to it.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import shardline
from tests.in_place.loops import assert_same, averaged, config

WIDTH = 8


class Plain:
    """A model and its optimizer as a loop of plain PyTorch uses them."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer, self.held = model, optimizer, averaged(model, optimizer)

    def __call__(self, *args):
        return self.model(*args)

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.optimizer.step()

    def zero_grad(self):
        self.optimizer.zero_grad()

    def weights(self):
        return self.held.full_state_dict()


class InPlace(Plain):
    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer
        self.held = shardline.shard(model, optimizer, config(3))


class Initialized(Plain):
    def __init__(self, model, optimizer):
        settings = config(3, train_micro_batch_size_per_gpu=4)
        self.held, *_ = shardline.initialize(model=model, optimizer=optimizer, config=settings)
        self.model = self.held

    def backward(self, loss):
        self.held.backward(loss)

    def step(self):
        self.held.step()

    def zero_grad(self):
        self.held.zero_grad()


def drawn(seed, *shape):
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    return torch.randn(*(shape or (4, WIDTH)), generator=generator)


def network(seed, last=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, last))


def with_sgd(make, model, momentum=0.9):
    return make(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum))


def gan(make, *, together, critics=1):
    """The discriminator steps first, ``critics`` times, with one backward of both losses or one of each."""
    generator, critic = with_sgd(make, network(0, WIDTH)), with_sgd(make, network(1))
    for step in range(3):
        for turn in range(critics):
            real, fake = drawn(10 * step + turn), generator(drawn(100 + 10 * step + turn)).detach()
            critic.zero_grad()
            if together:
                critic.backward(F.softplus(-critic(real)).mean() + F.softplus(critic(fake)).mean())
            else:
                critic.backward(F.softplus(-critic(real)).mean())
                critic.backward(F.softplus(critic(fake)).mean())
            critic.step()
        generator.zero_grad()
        generator.backward(F.softplus(-critic(generator(drawn(200 + step)))).mean())
        generator.step()
    return [generator.weights(), critic.weights()]


class Heads(nn.Module):
    """Both heads are computed; the loss uses one of them, or the input's layer alone."""

    def __init__(self):
        super().__init__()
        self.trunk, self.first = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        h = torch.tanh(self.trunk(x))
        return self.first(h), self.second(h), h


def heads(make):
    torch.manual_seed(3)
    net = with_sgd(make, Heads(), momentum=0.0)  # which goes on without gradients, but not in plain PyTorch
    for step, used in enumerate([0, 0, 1, 2, 1, 0]):
        net.zero_grad()
        net.backward(net(drawn(step))[used].square().mean())
        net.step()
    return net.weights()


def unrolled(make):
    """Another number of forwards in each window, one of them on the output of another."""
    net = with_sgd(make, network(4, WIDTH))
    for step, times in enumerate([1, 2, 4, 3, 1]):
        x = drawn(step)
        for _ in range(times):
            x = net(x)
        net.zero_grad()
        net.backward(x.square().mean())
        net.step()
    return net.weights()


def adversarial(make):
    """Every other step trains on inputs that were moved along their gradient."""
    net = with_sgd(make, network(5))
    for step in range(4):
        x = drawn(step)
        if step % 2:
            x.requires_grad_()
            net.backward(net(x).square().mean())
            x = (x + 0.1 * x.grad.sign()).detach()
            net.zero_grad()
        net.backward((net(x) - 1).square().mean())
        net.step()
        net.zero_grad()
    return net.weights()


def situations(make):
    return {
        "gan, one backward": gan(make, together=True),
        "gan, two backwards": gan(make, together=False),
        "gan, three critics": gan(make, together=True, critics=3),
        "heads": heads(make),
        "unrolled": unrolled(make),
        "adversarial": adversarial(make),
    }


def compared():
    return [situations(make) for make in (Plain, InPlace, Initialized)]


@pytest.mark.parametrize("world", [1, 2])
def test_a_backward_that_needs_other_weights_than_the_one_before(ranks, world):
    for plain, *found in ranks(compared, world):
        for way, got in zip(("shard", "initialize"), found, strict=True):
            assert_same(got, plain, 1e-5, way)
