"""What each stage sends and holds, counted: DESIGN.md's table of transitions, elements on the wire, bytes per rank."""

from __future__ import annotations

from functools import partial

import pytest

from tests.harness import STAGES, Setup, live_bytes, start, transitions
from tests.models import Mlp, TinyGpt, cross_entropy, mse, regression, tokens
from tests.spec.test_09_lora_budget import BYTES

UNITS = 5
"""Four blocks and a head."""


def steps_counted(build, loss_of, batch, config, steps=3):
    """Transitions and elements of each step; sizes of the parameters."""
    engine = start(build, config)
    history = []
    for _ in range(steps):
        before = transitions(engine)
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(loss_of(engine, engine.module, batch))
            engine.step()
        after = transitions(engine)
        history.append((after[0] - before[0], after[1] - before[1]))
    engine.destroy()
    return history


def expected_times(stage, accumulation, kept=False):
    """(gathers, reductions) per unit and step; `kept`: weights stay between forward and backward at stage 3."""
    gathers = {0: 1, 1: 1, 2: 1, 3: (1 if kept else 2) * accumulation}[stage]
    reductions = {0: 1, 1: 1, 2: accumulation, 3: accumulation}[stage]
    return gathers, reductions


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [2, 3])
def test_transitions_per_unit_and_step(ranks, world, stage, accumulation):
    setup = Setup(accumulation=accumulation)
    gathers, reductions = expected_times(stage, accumulation)
    for history in ranks(steps_counted, world, Mlp, mse, regression(4), setup.config(stage)):
        for counts, _ in history[1:]:
            units = {unit for _, unit in counts}
            assert len(units) == UNITS
            assert {counts["reduce", unit] for unit in units} == {reductions}
            per_unit = sorted(counts["gather", unit] for unit in units)
            if stage < 3:
                assert per_unit == [gathers] * UNITS
            else:  # the last unit of a forward is the first of its backward: it may stay
                assert per_unit[1:] == [gathers] * (UNITS - 1)
                assert accumulation <= per_unit[0] <= gathers


@pytest.mark.parametrize("accumulation", [1, 3])
def test_kept_between_forward_and_backward(ranks, accumulation):
    setup = Setup(accumulation=accumulation, zero={"reshard_after_forward": False})
    gathers, reductions = expected_times(3, accumulation, kept=True)
    for history in ranks(steps_counted, 2, Mlp, mse, regression(4), setup.config(3)):
        counts, _ = history[-1]
        units = {unit for _, unit in counts}
        assert {counts["reduce", unit] for unit in units} == {reductions}
        assert max(counts["gather", unit] for unit in units) <= gathers


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("build", "loss_of", "make"),
    [(partial(Mlp, 64, 4), mse, partial(regression, width=64)), (TinyGpt, cross_entropy, tokens)],
    ids=["mlp", "gpt"],
)
def test_elements_on_the_wire(ranks, build, loss_of, make, dtype, stage):
    """2P, 2P, 2P and 3P a micro-step at accumulation 1, plus the padding to 64 elements of parameters and shards."""
    model = build()
    sizes = [p.numel() for p in model.parameters()]
    total, padding, world = sum(sizes), 64 * len(sizes) + 64 * 2 * len(sizes), 2
    factor = 3 if stage == 3 else 2
    for history in ranks(steps_counted, world, build, loss_of, make(4), Setup(dtype).config(stage)):
        _, elements = history[-1]
        sent = elements["gather"] + elements["reduce"]
        stays = max(sum(p.numel() for p in child.parameters()) for child in [*model.blocks, model.head])
        assert sent <= factor * (total + padding)
        assert sent >= factor * total - (stays if stage == 3 else 0)


@pytest.mark.parametrize("stage", STAGES)
def test_a_single_process_sends_nothing(ranks, stage):
    (history,) = ranks(steps_counted, 1, Mlp, mse, regression(4), Setup(accumulation=2).config(stage))
    assert all(not counts and not elements for counts, elements in history)


def evaluations_counted(config):
    import torch

    engine = start(Mlp, config)
    batch = regression(4)
    engine.backward(mse(engine, engine.module, batch))
    engine.step()
    before, _ = transitions(engine)
    with torch.no_grad():
        engine(batch[0])
    once, _ = transitions(engine)
    engine.destroy()
    return once - before


@pytest.mark.parametrize("stage", STAGES)
def test_an_evaluation_gathers_once(ranks, stage):
    for counts in ranks(evaluations_counted, 2, Setup().config(stage)):
        assert set(counts.values()) == ({1} if stage == 3 else set())
        assert all(operation == "gather" for operation, _ in counts)


# --- bytes ------------------------------------------------------------------------------------------------------------

WIDTH, DEPTH = 64, 16


def bytes_in_a_window(config):
    """Live bytes after a step and a half: weights, accumulated gradients, masters and moments are all there."""
    before = live_bytes()
    batch = regression(2, width=WIDTH)
    own = live_bytes() - before
    engine = start(partial(Mlp, WIDTH, DEPTH), config)
    for _ in range(3):
        engine.backward(mse(engine, engine.module, batch))
        engine.step()
    middle = live_bytes() - before - own
    engine.destroy()
    return middle


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_state_bytes_per_rank(ranks, world, stage, dtype):
    """The formula, plus: padding to 64 elements per parameter and shard; two units' gradients and what is received of
    them; at stage 3 two gathered units; a few scalars."""
    model = Mlp(WIDTH, DEPTH)
    sizes = [p.numel() for p in model.parameters()]
    unit = sum(p.numel() for p in model.blocks[0].parameters())
    per_parameter = BYTES[dtype][stage](world)
    padding = 64 * len(sizes) + 64 * world * (DEPTH + 1)
    on_top = 4 * 4 * unit + (2 * {"fp32": 4, "bf16": 2}[dtype] * unit if stage == 3 else 0)
    low, high = per_parameter * sum(sizes), per_parameter * (sum(sizes) + padding) + on_top + 8192
    for middle in ranks(bytes_in_a_window, world, Setup(dtype, accumulation=2).config(stage)):
        assert 0.99 * low <= middle <= high, (
            f"{middle / sum(sizes):.2f} bytes per parameter, formula {per_parameter:.2f}"
        )


def bytes_after_destroy(config):
    before = live_bytes()
    engine = start(partial(Mlp, WIDTH, DEPTH), config)
    batch = regression(2, width=WIDTH)
    engine.backward(mse(engine, engine.module, batch))
    engine.step()
    engine.destroy()
    del engine, batch
    return live_bytes() - before


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_stays_after_the_engine(ranks, stage):
    for left in ranks(bytes_after_destroy, 2, Setup("bf16").config(stage)):
        assert left <= 4096
