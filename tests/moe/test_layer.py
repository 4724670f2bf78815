"""Experts against a loop over tokens, and the engine's training of them against the twin."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardline.errors import ModelError
from shardline.moe import MoE
from shardline.moe.routing import capacity_of, route
from tests.harness import Setup, check_against_twin
from tests.models import WIDTH, Block, regression


def by_token(layer: MoE, tokens: Tensor, k: int, capacity: int) -> tuple[Tensor, Tensor, list[int]]:
    """What a layer without noise computes, token by token; first choices come before second ones."""
    gates = (tokens.float() @ layer.gate.wg.weight.float().T).softmax(1)
    order = gates.argsort(1, descending=True)
    counts, kept = [0] * len(layer.experts), {}
    for choice in range(k):
        for token in range(len(tokens)):
            expert = int(order[token, choice])
            kept[token, choice] = counts[expert] < capacity
            counts[expert] += 1
    rows = []
    for token, x in enumerate(tokens):
        chosen = [int(order[token, choice]) for choice in range(k) if kept[token, choice]]
        whole = 1.0 if k == 1 else sum(gates[token, each] for each in chosen)
        rows.append(sum((gates[token, each] / whole * layer.experts[each](x) for each in chosen), torch.zeros_like(x)))
    first = order[:, 0]
    fractions = torch.stack([(first == each).float().mean() for each in range(len(layer.experts))])
    return torch.stack(rows), (gates.mean(0) * fractions).sum() * len(layer.experts), counts


def make(k: int = 1, experts: int = 4, **options: object) -> MoE:
    torch.manual_seed(3)
    layer = MoE(8, nn.Linear(8, 8), experts, k=k, use_rts=False, top2_2nd_expert_sampling=False, **options)
    for expert in layer.experts:
        nn.init.normal_(expert.weight)
    return layer


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("factor", [0.5, 1.0, 8.0])
def test_a_loop_over_tokens_gives_the_same(k, factor):
    layer = make(k, capacity_factor=factor, eval_capacity_factor=2 * factor, min_capacity=1)
    x = torch.randn(3, 5, 8, requires_grad=True)
    for mode, each in ((True, factor), (False, 2 * factor)):
        layer.train(mode)
        capacity = min(math.ceil(15 / 4 * each * k), 15)
        found, loss, counts = layer(x)
        wanted, wanted_loss, wanted_counts = by_token(layer, x.reshape(15, 8), k, capacity)
        torch.testing.assert_close(found, wanted.reshape(3, 5, 8))
        torch.testing.assert_close(loss, wanted_loss)
        assert counts.tolist() == wanted_counts
        for a, b in zip(
            torch.autograd.grad(found.square().sum() + loss, (x, *layer.parameters())),
            torch.autograd.grad(wanted.square().sum() + wanted_loss, (x, *layer.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_nothing_is_dropped_where_it_must_not_be():
    for k in (1, 2):
        layer = make(k, capacity_factor=0.1, min_capacity=0, drop_tokens=False)
        x = torch.randn(15, 8)
        torch.testing.assert_close(layer(x)[0], by_token(layer, x, k, 15)[0])


def test_capacity_is_a_share_with_a_least_and_a_most():
    assert capacity_of(16, 4, 1.0, 0) == 4
    assert capacity_of(17, 4, 1.0, 0) == 5
    assert capacity_of(16, 4, 1.25, 8) == 8
    assert capacity_of(6, 2, 4.0, 8) == 6


def test_a_residual_layer_passes_all_tokens_through_a_second_expert():
    layer = make(use_residual=True)
    x = torch.randn(2, 3, 8)
    share = layer.coefficient(x).softmax(-1)
    expected = by_token(layer, x.reshape(6, 8), 1, 4)[0].reshape(x.shape) * share[..., :1]
    torch.testing.assert_close(layer(x)[0], expected + layer.mlp(x) * share[..., 1:])


def test_padding_goes_nowhere_and_takes_no_place():
    layer = make(capacity_factor=1.0, min_capacity=1)
    x, used = torch.randn(16, 8), torch.arange(16) % 2
    found, _, counts = layer(x, used)
    assert torch.equal(found[used == 0], torch.zeros(8, 8))
    assert counts.sum() == 8
    torch.testing.assert_close(found[used == 1], by_token(layer, x[used == 1], 1, 4)[0])


def test_what_does_not_fit_is_dropped_at_random_in_training():
    logits = torch.tensor([[5.0, 0.0]]).repeat(12, 1)
    torch.manual_seed(0)
    seen = torch.stack([
        route(logits, 1, factor=0.5, random_drop=True).weight.squeeze(1).ne(0) for _ in range(400)
    ])  # fmt: skip
    assert seen.sum(1).eq(3).all()  # capacity
    torch.testing.assert_close(seen.float().mean(0), torch.full((12,), 0.25), rtol=0.3, atol=0)
    assert route(logits, 1, factor=0.5).weight.squeeze(1).ne(0).tolist() == [True] * 3 + [False] * 9


@pytest.mark.parametrize("k", [1, 2])
def test_the_last_choice_is_drawn_from_its_probabilities(k):
    logits = torch.tensor([[1.0, 0.3, -0.5]]).repeat(6000, 1)
    torch.manual_seed(0)
    routing = route(logits, k, factor=9.0, sample=True)
    drawn = routing.expert[:, k - 1].bincount(minlength=3) / 6000
    weights = logits[0].exp().clone()
    if k == 2:
        assert routing.expert[:, 0].eq(0).all()
        weights[0] = 0
    torch.testing.assert_close(drawn, weights / weights.sum(), rtol=0, atol=0.02)


def test_noise_is_for_training_alone():
    for options in ({"noisy_gate_policy": "Jitter"}, {"noisy_gate_policy": "RSample"}, {"k": 2}):
        torch.manual_seed(3)
        layer = MoE(8, nn.Linear(8, 8), 4, **options)
        x = torch.randn(64, 8)
        first = layer.gate(x)
        assert not torch.equal(first.expert, layer.gate(x).expert) or not torch.equal(first.loss, layer.gate(x).loss)
        layer.eval()
        first = layer.gate(x)
        assert torch.equal(first.expert, layer.gate(x).expert)
        assert torch.equal(first.weight, layer.gate(x).weight)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ep_size": 2}, "Groups of ranks for experts are not offered yet"),
        ({"k": 3}, "1 or 2 experts"),
        ({"k": 2, "num_experts": 1}, "num_experts=1"),
        ({"noisy_gate_policy": "rsample"}, "'rsample'"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(ModelError, match=words):
        MoE(8, nn.Linear(8, 8), **{"num_experts": 4, **options})


class Net(nn.Module):
    """Two layers of experts between blocks; its loss takes the load-balancing losses along."""

    def __init__(self) -> None:
        super().__init__()
        self.front = Block()
        self.layers = nn.ModuleList([
            MoE(WIDTH, Block(), 3, k=1, capacity_factor=0.5, min_capacity=1, use_rts=False),
            MoE(WIDTH, nn.Linear(WIDTH, WIDTH), 4, k=2, use_residual=True, top2_2nd_expert_sampling=False),
        ])  # fmt: skip
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, losses = self.front(x), []
        for layer in self.layers:
            x, loss, _ = layer(x)
            losses.append(loss)
        return self.head(x), torch.stack(losses).sum()


def loss_of(call, module, batch):
    found, balance = call(batch[0])
    return F.mse_loss(found.float(), batch[1]) + 0.01 * balance


def test_the_engine_trains_it_at_every_stage(ranks):
    check_against_twin(ranks, Net, loss_of, regression, setup=Setup(micro=6, accumulation=2))


def test_in_bf16(ranks):
    check_against_twin(ranks, Net, loss_of, regression, stages=(2, 3), setup=Setup(dtype="bf16", micro=6))
