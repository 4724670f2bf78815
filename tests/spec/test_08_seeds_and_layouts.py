"""Seeds and layouts: rank 0's weights win, and no shape, stride, tie or precision of a parameter changes a result."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.harness import (
    DTYPES,
    STAGES,
    Setup,
    assert_close,
    assert_identical,
    assert_ranks_agree,
    check_against_twin,
    seeded,
    spread,
    start,
    train_twin,
)
from tests.models import (
    ConvNet,
    Functional,
    Mlp,
    Odd,
    SparseEmbedding,
    Speck,
    TinyGpt,
    cross_entropy,
    images,
    mse,
    odd_loss,
    regression,
    tokens,
)


class Counted(Mlp):
    """With buffers, one of them integral, that differ by seed as the weights do."""

    def __init__(self):
        super().__init__(depth=2)
        self.register_buffer("offset", torch.randn(1, 32))
        self.register_buffer("number", torch.randint(1 << 40, ()))
        self.register_buffer("flags", torch.rand(5) < 0.5)

    def forward(self, x):
        return super().forward(x + self.offset)


def another_seed_on_every_rank(batches, config):
    import shardline

    rank = dist.get_rank()
    engine, *_ = shardline.initialize(model=seeded(Counted, seed=rank), config=config)
    begin = engine.full_state_dict()
    for window in batches:
        engine.backward(mse(engine, engine.module, window[0][rank]))
        engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return begin, state


@pytest.mark.parametrize("stage", STAGES)
def test_rank_0_wins(ranks, stage):
    setup = Setup()
    batches = spread(regression, 2, setup, 3)
    _, expected = train_twin(Counted, mse, batches, setup)
    results = ranks(another_seed_on_every_rank, 3, batches, setup.config(stage))
    for begin, state in results:
        assert_identical(begin, seeded(Counted).state_dict())
        assert_close(state, expected["state"])
    assert_ranks_agree([state for _, state in results])


@pytest.mark.parametrize(("dtype", "accumulation"), [("fp32", 2), ("bf16", 1), ("fp16", 1)])
def test_batch_norm(ranks, dtype, accumulation):
    """Low precision without accumulation, which rounds sums: statistics of four samples multiply any rounding."""
    check_against_twin(ranks, ConvNet, cross_entropy, images, setup=Setup(dtype, "SGD", accumulation=accumulation))


def dtypes_of(config):
    engine = start(ConvNet, config)
    dtypes = {name: p.dtype for name, p in engine.module.named_parameters()}
    buffers = {name: b.dtype for name, b in engine.module.named_buffers()}
    state = {name: value.dtype for name, value in engine.full_state_dict().items()}
    engine.destroy()
    return dtypes, buffers, state


@pytest.mark.parametrize("stage", STAGES)
def test_statistics_keep_fp32(ranks, stage):
    for dtypes, buffers, state in ranks(dtypes_of, 2, Setup("bf16").config(stage)):
        norms = {name for name in dtypes if name.startswith("norm")}
        assert {dtypes[name] for name in norms} == {torch.float32}
        assert {dtypes[name] for name in dtypes.keys() - norms} == {torch.bfloat16}
        assert {b.dtype for b in seeded(ConvNet).buffers()} == set(buffers.values())
        assert {dtype for name, dtype in state.items() if name in dtypes} == {torch.float32}


# --- channels_last ----------------------------------------------------------------------------------------------------


def channels_last():
    return ConvNet().to(memory_format=torch.channels_last)


def strides_of(batches, config):
    rank = dist.get_rank()
    engine = start(channels_last, config)
    loss = cross_entropy(engine, engine.module, batches[0][0][rank])
    engine.backward(loss)
    engine.step()
    with engine.gathered_parameters():
        strides = {name: p.stride() for name, p in engine.module.named_parameters() if p.dim() == 4}
        weight = engine.module.conv2.weight.detach().float().clone()
    state = engine.full_state_dict()
    engine.destroy()
    return strides, weight, state


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_channels_last_stays(ranks, stage, dtype):
    setup = Setup(dtype, "SGD")
    batches = spread(images, 1, setup, 2)
    _, expected = train_twin(channels_last, cross_entropy, batches, setup)
    before = setup.twin(seeded(channels_last)).state()
    wanted = {name: p.stride() for name, p in seeded(channels_last).named_parameters() if p.dim() == 4}
    assert all(stride[1] == 1 for stride in wanted.values())
    for strides, weight, state in ranks(strides_of, 2, batches, setup.config(stage)):
        assert strides == wanted
        assert_close(state, expected["state"], dtype, before)
        torch.testing.assert_close(weight, expected["state"]["conv2.weight"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_channels_last(ranks, dtype):
    check_against_twin(ranks, channels_last, cross_entropy, images, setup=Setup(dtype, "SGD"))


class Transposed(nn.Module):
    """Parameters that are dense but in no standard order, and one that is a strided view of more memory."""

    def __init__(self):
        super().__init__()
        self.turned = nn.Parameter(torch.randn(32, 16).t() * 0.2)
        self.sparse = nn.Parameter(torch.randn(16, 64)[:, ::2] * 0.2)

    def forward(self, x):
        return torch.tanh(x @ self.turned.t()) @ self.sparse


def test_strided_parameters(ranks):
    check_against_twin(ranks, Transposed, mse, regression)


# --- ties -------------------------------------------------------------------------------------------------------------


def ties(batches, config):
    rank = dist.get_rank()
    engine = start(TinyGpt, config)
    engine.backward(cross_entropy(engine, engine.module, batches[0][0][rank]))
    engine.step()
    tied = engine.module.head.weight is engine.module.embed.weight
    names = list(engine.full_state_dict())
    engine.destroy()
    return tied, names, engine.module.head.weight is engine.module.embed.weight


@pytest.mark.parametrize("stage", STAGES)
def test_a_tie_stays_a_tie(ranks, stage):
    setup = Setup()
    for during, names, after in ranks(ties, 2, spread(tokens, 1, setup, 2), setup.config(stage)):
        assert during and after
        assert names == list(seeded(TinyGpt).state_dict())


class TiedBlocks(nn.Module):
    """Block 0 and block 2 share one weight; so one unit has users far apart."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.blocks[2].weight = self.blocks[0].weight
        self.again = self.blocks[1]

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.again(x)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ties_between_blocks(ranks, accumulation):
    check_against_twin(ranks, TiedBlocks, mse, regression, setup=Setup(accumulation=accumulation, clip=0.1))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tied_embedding_is_clipped_once(ranks, dtype):
    check_against_twin(ranks, TinyGpt, cross_entropy, tokens, setup=Setup(dtype, "SGD", clip=0.2))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sparse_embedding(ranks, accumulation):
    setup = Setup("fp32", "SGD", accumulation=accumulation)
    check_against_twin(ranks, SparseEmbedding, cross_entropy, tokens, setup=setup)


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_rank_that_owns_nothing(ranks, dtype):
    check_against_twin(ranks, Speck, mse, regression, world=4, setup=Setup(dtype, "SGD", clip=0.1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_odd_shapes(ranks, dtype, world):
    """Rank 0, size 0, and sizes that nothing divides."""
    check_against_twin(ranks, Odd, odd_loss, regression, world=world, setup=Setup(dtype, "SGD", clip=0.05))


def test_odd_shapes_with_adam(ranks):
    check_against_twin(ranks, Odd, odd_loss, regression, setup=Setup(accumulation=3))


def test_weights_used_outside_their_modules(ranks):
    check_against_twin(ranks, Functional, cross_entropy, tokens, setup=Setup("bf16", "SGD"))
