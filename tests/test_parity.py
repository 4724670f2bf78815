"""The engine against the twin over stage x precision x accumulation x world x optimizer; a part of it by default.

Tolerances are `harness.TOLERANCE`: fp32 within 1e-5 of each weight, bf16 and fp16 within 2% and 0.5% of the distance it
was moved; on a single process, and between the stages without accumulation, bit by bit.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.harness import (
    DTYPES,
    OPTIMIZERS,
    STAGES,
    Setup,
    assert_close,
    assert_identical,
    assert_ranks_agree,
    check_against_twin,
    full,
    seeded,
    spread,
    train,
    train_twin,
)
from tests.models import ConvNet, Lora, Mlp, OddGradients, TinyGpt, cross_entropy, images, mse, regression, tokens

MATRIX = [
    pytest.param(dtype, accumulation, world, optimizer, marks=[] if usual else full)
    for dtype, accumulation, world, optimizer in itertools.product(DTYPES, (1, 3), (2, 4), OPTIMIZERS)
    for usual in [
        (world == 2 and (accumulation == 1) == (optimizer == "AdamW"))
        or (world, accumulation, dtype, optimizer) in {(4, 3, "fp32", "AdamW"), (4, 1, "bf16", "SGD")}
    ]
]
"""Every stage runs in each; the default part meets every value, and every pair with a stage and a precision."""


@pytest.mark.parametrize(("dtype", "accumulation", "world", "optimizer"), MATRIX)
def test_every_stage_is_the_twin(ranks, dtype, accumulation, world, optimizer):
    setup = Setup(dtype, optimizer, accumulation=accumulation, micro=2)
    check_against_twin(ranks, TinyGpt, cross_entropy, tokens, world=world, setup=setup, timeout=100)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=full)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clipping(ranks, dtype, world):
    """Clipped at every step, over tied and positional parameters and accumulated windows."""
    setup = Setup(dtype, "SGD", clip=0.25, accumulation=2, micro=2)
    batches = spread(tokens, 3, setup, world)
    assert min(train_twin(TinyGpt, cross_entropy, batches, setup)[1]["norms"]) > 0.25
    check_against_twin(ranks, TinyGpt, cross_entropy, tokens, world=world, setup=setup)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_process_is_the_twin_bit_by_bit(ranks, dtype, accumulation, optimizer):
    setup = Setup(dtype, optimizer, accumulation=accumulation)
    check_bits(ranks, setup)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_process_clips_as_the_twin_bit_by_bit(ranks, dtype):
    """Given the same norm: its last bit depends on the order in which squares are added up."""
    check_bits(ranks, Setup(dtype, "AdamW", accumulation=2, clip=0.25))


def check_bits(ranks, setup):
    batches = spread(tokens, 4, setup, 1)
    (results,) = ranks(train, 1, TinyGpt, cross_entropy, batches, [setup.config(stage) for stage in STAGES])
    _, expected = train_twin(TinyGpt, cross_entropy, batches, setup, results[0]["norms"])
    assert not setup.clip or min(expected["norms"]) > setup.clip
    for result in results:
        assert_identical(result["state"], expected["state"])
        assert result["losses"] == [loss for (loss,) in expected["losses"]]
        assert result["norms"] == results[0]["norms"]
        torch.testing.assert_close(result["norms"], expected["norms"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "clip"), [("fp32", 0.0), ("fp32", 0.25), ("bf16", 0.25)])
@pytest.mark.parametrize("world", [2, 3, pytest.param(4, marks=full)])
def test_stages_are_one_another_bit_by_bit(ranks, world, dtype, clip, optimizer):
    """Accumulation 1: stages differ in where things live, never in what is computed."""
    setup = Setup(dtype, optimizer, clip=clip, micro=3)
    batches = spread(tokens, 4, setup, world)
    results = ranks(train, world, TinyGpt, cross_entropy, batches, [setup.config(stage) for stage in STAGES])
    for by_stage in results:
        for stage in STAGES[1:]:
            assert_identical(by_stage[stage]["state"], by_stage[0]["state"])
            assert by_stage[stage]["losses"] == by_stage[0]["losses"]
            assert by_stage[stage]["norms"] == by_stage[0]["norms"]


def mixed_scales(n, seed):
    """Targets from 1e-3 to 1e3: a window's large gradients and small ones meet in one sum."""
    x, y = regression(n, seed=seed)
    return x, y * 10.0 ** (seed % 7 - 3)


@pytest.mark.parametrize("transport", ["auto", "gloo"])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_windows_are_summed_in_fp32(ranks, dtype, world, transport):
    """Accumulation 8: stage 0 is 1 and 2 is 3 bit by bit, and all are the sum within the rounding of fp32 sums."""
    setup = Setup(dtype, accumulation=8, more={"communication_transport": transport})
    setup.more["optimizer"] = {"type": "SGD", "params": {"lr": 1.0}}
    (window,) = spread(mixed_scales, 1, setup, world)
    results = ranks(train, world, Mlp, mse, [window], [setup.config(stage) for stage in STAGES])
    model = seeded(Mlp)
    begin = {name: value.double() for name, value in model.state_dict().items()}
    model.to(DTYPES[dtype])
    total = {name: torch.zeros_like(value) for name, value in begin.items()}
    size = {name: torch.zeros_like(value) for name, value in begin.items()}
    for micro in window:
        for x, y in micro:
            model.zero_grad()
            (mse(model, model, (x.to(DTYPES[dtype]), y)) / 8).backward()
            for name, param in model.named_parameters():
                total[name] += param.grad.double() / world
                size[name] += param.grad.double().abs() / world
    unit = 2.0**-24
    for by_stage in results:
        assert_identical(by_stage[1]["state"], by_stage[0]["state"])
        assert_identical(by_stage[3]["state"], by_stage[2]["state"])
        for result in by_stage:
            for name, value in result["state"].items():
                off = (value.double() - (begin[name] - total[name])).abs()
                allowed = unit * ((8 * world + 4) * size[name] + 2 * begin[name].abs() + 2 * total[name].abs())
                assert bool((off <= allowed).all()), (name, float((off / allowed).max()))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_transports_are_one_another_bit_by_bit(ranks, dtype, world, accumulation):
    """gloo, and reading each other's memory."""
    setup = Setup(dtype, "AdamW", clip=0.25, accumulation=accumulation, micro=2)
    batches = spread(tokens, 4, setup, world)
    configs = [setup.config(stage) for stage in STAGES]
    over_gloo = [{**config, "communication_transport": "gloo"} for config in configs]
    expected = ranks(train, world, TinyGpt, cross_entropy, batches, over_gloo)
    for found, others in zip(ranks(train, world, TinyGpt, cross_entropy, batches, configs), expected, strict=True):
        for result, other in zip(found, others, strict=True):
            assert_identical(result["state"], other["state"])
            assert result["losses"] == other["losses"] and result["norms"] == other["norms"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_that_lie_in_odd_ways(ranks, dtype):
    setup = Setup(dtype, "AdamW", clip=0.25, micro=2)
    batches = spread(regression, 3, setup, 2)
    configs = [setup.config(stage) for stage in STAGES]
    over_gloo = [{**config, "communication_transport": "gloo"} for config in configs]
    expected = ranks(train, 2, OddGradients, mse, batches, over_gloo)
    by_hand = train_twin(OddGradients, mse, batches, setup)[1]["state"]
    start = seeded(OddGradients).state_dict()
    for found, others in zip(ranks(train, 2, OddGradients, mse, batches, configs), expected, strict=True):
        for result, other in zip(found, others, strict=True):
            assert_identical(result["state"], other["state"])
            assert_close(result["state"], by_hand, dtype, start)


@pytest.mark.parametrize(
    "zero", [{"reshard_after_forward": False}, {"unit_min_numel": 100_000}, {"unit_max_numel": 2000}]
)
def test_where_units_are_cut_changes_no_result(ranks, zero):
    setup = Setup("fp32", "AdamW", clip=0.25, zero=zero)
    check_against_twin(ranks, TinyGpt, cross_entropy, tokens, setup=setup, stages=(1, 3))


def test_persistent_small_parameters(ranks):
    """Below the threshold nothing is sharded between forward and backward; results stay."""
    setup = Setup("bf16", "AdamW", accumulation=2, zero={"stage3_param_persistence_threshold": 40})
    check_against_twin(ranks, TinyGpt, cross_entropy, tokens, setup=setup, stages=(3,))


@pytest.mark.parametrize("world", [1, 3])
def test_frozen_parameters(ranks, world):
    def narrow(n, seed):
        return regression(n, width=64, seed=seed)

    setup = Setup("bf16", "AdamW", clip=0.1, accumulation=2)
    check_against_twin(ranks, narrow_lora, mse, narrow, world=world, setup=setup)


def narrow_lora():
    return Lora(width=64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_norm(ranks, dtype):
    """On one rank even the running statistics agree."""
    setup = Setup(dtype, "SGD", clip=1.0)
    batches = spread(images, 3, setup, 1)
    _, expected = train_twin(ConvNet, cross_entropy, batches, setup)
    (results,) = ranks(train, 1, ConvNet, cross_entropy, batches, [setup.config(s) for s in STAGES])
    for result in results:
        before = setup.twin(seeded(ConvNet)).state()
        assert_close(result["state"], expected["state"], dtype, before)
        for name in ("norm1.running_mean", "norm2.running_var", "norm2.num_batches_tracked"):
            torch.testing.assert_close(result["state"][name], expected["state"][name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("reduce", ["fp32", "bf16"])
def test_dtype_of_reductions(ranks, reduce):
    setup = Setup("bf16", "SGD", accumulation=2, more={"communication_data_type": reduce})
    check_against_twin(ranks, Mlp, mse, regression, setup=setup)


def test_accumulation_in_the_compute_dtype(ranks):
    """`data_types.grad_accum_dtype`: bf16 sums are allowed on request, and coarser."""
    setup = Setup("bf16", "SGD", accumulation=3, more={"data_types": {"grad_accum_dtype": "bf16"}})
    batches = spread(regression, 3, setup, 2)
    before = setup.twin(seeded(Mlp)).state()
    _, expected = train_twin(Mlp, mse, batches, setup)
    results = ranks(train, 2, Mlp, mse, batches, [setup.config(stage) for stage in STAGES])
    assert_ranks_agree([result[0]["state"] for result in results])
    for result in results[0]:
        assert_close(result["state"], expected["state"], "bf16", before, times=2)


def test_it_learns(ranks):
    """No tolerance hides a run that stands still: every stage takes the loss down by half."""
    setup = Setup("bf16", "AdamW")
    batches = [[[tokens(4, seed=rank) for rank in range(2)]]] * 12
    (first, _) = ranks(train, 2, TinyGpt, cross_entropy, batches, [setup.config(stage) for stage in STAGES])
    for result in first:
        assert result["losses"][-1] < 0.5 * result["losses"][0]
