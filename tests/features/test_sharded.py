"""Models that are sharded over the ranks while they are made, against the same models made plainly."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardline
from shardline.errors import ModelError, SealedError, UsageError
from tests.harness import Setup, assert_identical, is_whole, most_bytes

WIDTH = 32


class Inits(nn.Module):
    """Every way in which constructors write weights."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, WIDTH, padding_idx=3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)) for _ in range(3))
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.recurrent = nn.LSTM(WIDTH, WIDTH, num_layers=2)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH), 2)  # deep copies
        self.scale = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.1)
        self.one = nn.Parameter(torch.tensor(2.5))
        self.none = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("places", torch.arange(WIDTH))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.half = nn.Linear(WIDTH, WIDTH).to(torch.bfloat16)
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.words.weight  # tied
        self.replaced = nn.Linear(WIDTH, WIDTH)
        self.replaced.weight = nn.Parameter(torch.rand(WIDTH, WIDTH))
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        third = self.blocks[0][0].weight.view(4, -1, WIDTH)  # a view that outlives other allocations
        for part in third:
            nn.init.orthogonal_(part)
        self.apply(self._init_weights)
        with torch.no_grad():
            self.blocks[1][0].weight.copy_(self.blocks[2][0].weight @ self.scale)
        self.blocks[2][0].load_state_dict({"weight": torch.ones(WIDTH, WIDTH), "bias": torch.zeros(WIDTH)})

    def _init_weights(self, module):
        if isinstance(module, nn.Linear) and module.weight.dtype == torch.float32 and module is not self.head:
            module.weight.data.mul_(0.5).add_(torch.randn_like(module.weight))
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(std=0.02)
            module.weight.data[module.padding_idx].zero_()


def plainly(build, seed=3):
    torch.manual_seed(seed)
    return build()


def sharded(build, seed=3):
    torch.manual_seed(seed)
    with shardline.sharded_weights():
        return build()


def values_of(model):
    with shardline.gathered_parameters(model):
        return {name: value.clone() for name, value in model.state_dict().items()}


def same_values():
    expected = plainly(Inits)
    drawn = torch.rand(3)
    model = sharded(Inits, seed=3 if dist.get_rank() == 0 else 4)  # rank 0's values count
    if dist.get_rank() == 0:
        assert torch.equal(torch.rand(3), drawn)
    several = dist.get_world_size() > 1
    for (name, param), (_, wanted) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert (param.shape, param.dtype, param.stride()) == (wanted.shape, wanted.dtype, wanted.stride()), name
        assert param.requires_grad == wanted.requires_grad and isinstance(param, nn.Parameter)
        assert is_whole(param) != several or param.numel() <= 1, name
        assert several == (type(param) is not nn.Parameter), name
    assert model.head.weight is model.words.weight
    assert_identical(values_of(model), expected.state_dict())
    for stage in (3, 1, 0):
        config = Setup().config(stage)
        model = sharded(Inits)
        engine, *_ = shardline.initialize(model=model, config=config)
        assert_identical(
            engine.full_state_dict(),
            {k: v.float() if k.startswith("half") else v for k, v in expected.state_dict().items()},
        )
        engine.destroy()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_values_are_those_of_the_plain_construction(ranks, world):
    ranks(same_values, world)


# -- memory -----------------------------------------------------------------------------------------------------------

LARGE, LAYERS = 256, 6


class Tall(nn.Module):
    """Equal weights, so that the largest parameter is a small part of the whole; an initialiser that visits all."""

    def __init__(self):
        super().__init__()
        self.first = nn.Embedding(2 * LARGE, LARGE)
        self.blocks = nn.ModuleList(nn.Linear(LARGE, LARGE) for _ in range(LAYERS))
        self.list = nn.Sequential(*(nn.Linear(LARGE, LARGE) for _ in range(LAYERS)))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids):
        return self.list(self.first(ids))


def peaks():
    world = dist.get_world_size()
    config = Setup().config(3) | {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    model, made = most_bytes(lambda: sharded(Tall))
    engine, begun = most_bytes(lambda: shardline.initialize(model=model, config=config)[0])
    whole = 4 * sum(param.numel() for param in model.parameters())
    engine.destroy()
    return made, begun, whole / world


@pytest.mark.parametrize("world", [2, 4])
def test_no_rank_holds_more_than_its_shard_and_the_largest_parameter(ranks, world):
    largest = 4 * 2 * LARGE * LARGE
    for made, begun, shard in ranks(peaks, world):
        assert made <= shard + 1.15 * largest
        assert begun <= shard + 1.1 * largest


# -- what can be done with it -----------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self, last=4):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, last)
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x):
        return self.last(self.first(x))


def error_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def edits_and_refusals():
    model, expected = sharded(Small), plainly(Small).state_dict()
    weight = model.first.weight
    for call, wanted in (
        (lambda: weight.sum(), "sum: parameter 'Linear.weight' is sharded and not gathered here. Read or change it"),
        (lambda: model(torch.ones(2, 8)), "with shardline.gathered_parameters(...):"),
        (lambda: model.double(), "A model is moved or converted inside `with shardline.sharded_weights():`"),
        (lambda: copy.deepcopy(model), "copying: parameter 'Linear.weight'"),
        (lambda: torch.save(model.state_dict(), io.BytesIO()), "pickling: parameter 'Linear.weight'"),
        (lambda: model.load_state_dict(expected), "copy_: parameter 'Linear.weight' is sharded"),
    ):
        said = error_of(call)
        assert "SealedError" in said or "RuntimeError" in said, said
        assert wanted in said, said
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.items()}
    assert model.to("cpu") is model and model.float() is model and weight.stride(0) == 8  # changes nothing
    changed = r"'Linear.weight' was changed inside gathered_parameters\(\)"
    with pytest.raises(UsageError, match=changed), shardline.gathered_parameters(weight), torch.no_grad():
        weight.zero_()
    with pytest.raises(UsageError, match="write=True"), shardline.gathered_parameters([weight]):
        weight.data.zero_()
    assert_identical(values_of(model), expected)
    with shardline.gathered_parameters(model.last, write=True):
        assert not is_whole(weight) and is_whole(model.last.weight)
        if dist.get_rank() == 0:
            alias = model.last.weight.data  # which lives on
            alias.fill_(3.0)
            with pytest.raises(SealedError), torch.no_grad():
                weight.zero_()
        with shardline.gathered_parameters(model.last):  # is whole already
            pass
    expected["last.weight"].fill_(3.0)
    assert_identical(values_of(model), expected)
    with pytest.raises(UsageError, match="Call it after them"), shardline.gathered_parameters(model):
        shardline.initialize(model=model, config=Setup().config(3))
    said = error_of(lambda: shardline.initialize(model=model, config=Setup().config(3), lr_scheduler=fail_on_last))
    assert "no rate" in said, said
    assert not is_whole(weight)
    assert_identical(values_of(model), expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = shardline.initialize(model=model, optimizer=optimizer, config=Setup().config(3))
    assert_identical(engine.full_state_dict(), expected)
    engine.backward(engine(torch.ones(2, 8)).sum())
    engine.step()
    engine.destroy()
    assert is_whole(weight) and type(weight) is nn.Parameter


def one_door():
    """``shardline.gathered_parameters`` before there is an engine, with two, with one, and without any."""
    early, taken, second = sharded(Small), plainly(Small), plainly(Small, seed=4)
    models, found = (early, taken, second), []
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    engines = [
        shardline.initialize(model=model, optimizer=optimizer, config=Setup().config(3))[0]
        for model, optimizer in zip(models[1:], optimizers[1:], strict=True)
    ]
    weights = [model.first.weight for model in models]
    for given in (weights, iter(weights), weights[::-1] if dist.get_rank() else weights):  # ranks order them alike
        assert not any(map(is_whole, weights))
        with shardline.gathered_parameters(given):
            assert all(map(is_whole, weights))
            found.append([float(weight.detach().double().sum()) for weight in weights])
    changed = r"'first.weight' was changed inside gathered_parameters\(\)"
    for given in ([weights[2]], weights):
        with pytest.raises(UsageError, match=changed), shardline.gathered_parameters(given), torch.no_grad():
            given[-1].zero_()
    with shardline.gathered_parameters(weights, write=True), torch.no_grad():
        for weight in weights:
            weight.fill_(dist.get_rank() + 1.0)
    engines[0].destroy()
    with shardline.gathered_parameters(weights):
        found.append([float(weight.detach().double().mean()) for weight in weights])
    engines[1].destroy()
    return found


def test_parameters_are_gathered_by_one_door_before_and_after_initialize(ranks):
    sums = [float(plainly(Small, seed).first.weight.detach().double().sum()) for seed in (3, 3, 4)]
    for found in ranks(one_door, 2):
        assert found == [pytest.approx(sums)] * 3 + [[1.0, 1.0, 1.0]]


def fail_on_last(optimizer):
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("no rate")
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)


class Fails(Small):
    def __init__(self, ranks):
        super().__init__()
        if dist.get_rank() in ranks:
            raise ArithmeticError("no luck")
        self.more = nn.Linear(8, 8)


def ranks_that_differ():
    rank = dist.get_rank()
    said = [error_of(lambda build=build: sharded(build)) for build in (
        lambda: Fails([1]), lambda: Fails([0, 1]), lambda: Small(4 + rank), lambda: Small() if rank else Fails([])
    )]  # fmt: skip
    with shardline.sharded_weights(), shardline.sharded_weights():
        model = Small()  # all is well after that
    with torch.device("meta"), shardline.sharded_weights():
        model.last = nn.Linear(8, 4)
    torch.manual_seed(5)
    engine, *_ = shardline.initialize(model=model, config=Setup().config(3))
    found = engine.full_state_dict()
    engine.destroy()
    torch.manual_seed(5)
    assert torch.equal(found["last.weight"], nn.Linear(8, 4).weight)
    return said


def test_whole_for_a_while_and_refused_elsewhere(ranks):
    ranks(edits_and_refusals, 2)


def test_ranks_that_differ_raise_alike(ranks):
    for rank, said in enumerate(ranks(ranks_that_differ, 2)):
        alone, together, shapes, orders = said
        assert "ArithmeticError: no luck" in alone and ("rank 1 failed" in alone) == (rank == 0)
        assert together == "ArithmeticError: no luck"
        assert shapes.startswith("DisagreementError") and "rank 1 has (5, 8) of torch.float32" in shapes
        assert orders.startswith("DisagreementError") and "rank 1 to end sharded_weights()" in orders


class Shares(Small):
    def __init__(self):
        super().__init__()
        self.kept = self.first.weight.data  # who writes to it must not lose that
        self.large = nn.Parameter(torch.zeros(64, 64))
        self.kept.fill_(7.0)
        self.lazy = nn.LazyLinear(3)


def shared_memory():
    model = sharded(Shares)
    assert is_whole(model.first.weight) and bool((model.first.weight == 7.0).all())
    assert not is_whole(model.large)
    with pytest.raises(ModelError, match="share memory"):
        shardline.initialize(model=model, config=Setup().config(3))


def test_what_shares_memory_stays_whole(ranks):
    ranks(shared_memory, 2)
