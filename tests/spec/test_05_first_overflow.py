"""First step overflows: fp16 from a scale of 2^24 skips until it fits, and then equals the twin that skipped too."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist

from tests.harness import STAGES, Setup, assert_close, assert_ranks_agree, loss_scale, seeded, spread
from tests.models import Mlp, mse, regression

STEPS = 14


class NaiveLion(torch.optim.Optimizer):
    """Lion as its paper's algorithm 2 writes it: the sign of an interpolation, then the average (arXiv:2302.06675)."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                update = torch.sign(b1 * m + (1 - b1) * p.grad) + group["weight_decay"] * p
                p -= group["lr"] * update
                m.copy_(b2 * m + (1 - b2) * p.grad)


OPTIMIZERS = {
    "SGD": ({"lr": 0.05, "momentum": 0.9, "nesterov": True}, torch.optim.SGD),
    "Adam": ({"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1}, torch.optim.AdamW),
    "RMSprop": ({"lr": 1e-3, "alpha": 0.9, "eps": 1e-3, "momentum": 0.5}, torch.optim.RMSprop),
    "Lion": ({"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}, NaiveLion),
    "NAdam": ({"lr": 1e-3, "eps": 1e-4}, torch.optim.NAdam),
    "Adagrad": ({"lr": 1e-2, "eps": 1e-4}, torch.optim.Adagrad),
}
"""By DeepSpeed's names, so "Adam" decays decoupled, as AdamW does (reference 1.8.3)."""

TIMES = {"Lion": 20}
"""Lion steps by a sign: an average near zero that rounds to the other side moves by twice the learning rate."""


def setup_for(name, **kwargs):
    more = {
        "optimizer": {"type": name, "params": OPTIMIZERS[name][0]},
        "scheduler": {"type": "StepLR", "params": {"step_size": 2, "gamma": 0.5}},
    }
    return Setup("fp16", scale_power=24, more=more, **kwargs)


def run_twin(name, setup, batches, gamma=0.5):
    params, kind = OPTIMIZERS[name]
    twin = setup.twin(seeded(Mlp), lambda masters: kind(list(masters.values()), **params))
    schedule = torch.optim.lr_scheduler.StepLR(twin.optimizer, 2, gamma)
    trace = []
    for window in batches:
        for micro in window:
            for batch in micro:
                twin.backward(mse(twin, twin.model, batch))
        applied = twin.step()
        if applied:
            schedule.step()
        trace.append((applied, twin.scale.value, schedule.get_last_lr()[0]))
    return twin, trace


class Lines(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def overflowing(batches, config):
    import shardline

    rank = dist.get_rank()
    handler = Lines()
    logging.getLogger("shardline").addHandler(handler)
    engine, _, _, schedule = shardline.initialize(model=seeded(Mlp), config=config)
    trace, finite = [], True
    for window in batches:
        for micro in window:
            engine.backward(mse(engine, engine.module, micro[rank]))
            engine.step()
        trace.append((engine.was_step_applied(), loss_scale(engine), schedule.get_last_lr()[0]))
        finite &= all(x.isfinite().all().item() for x in engine.full_state_dict().values())
    result = {
        "state": engine.full_state_dict(),
        "trace": trace,
        "finite": finite,
        "skipped": engine.skipped_steps,
        "global": engine.global_steps,
        "samples": engine.global_samples,
        "micro": engine.micro_steps,
        "lines": handler.lines,
    }
    engine.destroy()
    logging.getLogger("shardline").removeHandler(handler)
    return result


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_recovers_to_the_twin_that_skipped(ranks, name, stage):
    setup = setup_for(name)
    batches = spread(regression, STEPS, setup, 2)
    before = setup.twin(seeded(Mlp)).state()
    twin, trace = run_twin(name, setup, batches)
    assert 3 <= twin.skipped < STEPS - 3
    results = ranks(overflowing, 2, batches, setup.config(stage))
    assert_ranks_agree([result["state"] for result in results])
    for rank, result in enumerate(results):
        assert result["finite"]
        same_trace(result["trace"], trace)
        assert_close(result["state"], twin.state(), "fp16", before, TIMES.get(name, 1.0))
        assert result["skipped"] == twin.skipped
        assert result["global"] == STEPS  # a skipped step counts as one, as in DeepSpeed (reference 1.8.4)
        assert result["samples"] == STEPS * setup.micro * 2
        said = [line for line in result["lines"] if "skip" in line.lower()]
        assert len(said) == (twin.skipped if rank == 0 else 0), said


def same_trace(actual, expected):
    """(applied, scale, learning rate) after each step."""
    assert [step[:2] for step in actual] == [step[:2] for step in expected]
    assert [step[2] for step in actual] == pytest.approx([step[2] for step in expected], rel=1e-12)


@pytest.mark.parametrize("stage", STAGES)
def test_on_a_single_process(ranks, stage):
    setup = setup_for("SGD", accumulation=2)
    batches = spread(regression, STEPS, setup, 1)
    twin, trace = run_twin("SGD", setup, batches)
    (result,) = ranks(overflowing, 1, batches, setup.config(stage))
    same_trace(result["trace"], trace)
    assert result["finite"] and result["skipped"] == twin.skipped > 0
    assert_close(result["state"], twin.state(), "fp16", setup.twin(seeded(Mlp)).state())


@pytest.mark.parametrize("stage", STAGES)
def test_infinite_on_one_rank_only(ranks, stage):
    """All ranks skip, and each line says why and what the scale is now."""
    setup = Setup("fp16", "SGD", scale_power=8, hysteresis=2, more=setup_for("SGD").more)
    batches = spread(regression, 5, setup, 2)
    for step in (1, 3):
        x, y = batches[step][0][1]
        batches[step][0][1] = (x * 1e30, y)
    twin, trace = run_twin("SGD", setup, batches)
    assert [applied for applied, _, _ in trace] == [True, False, True, False, True]
    assert [scale for _, scale, _ in trace] == [256, 256, 256, 128, 128]
    results = ranks(overflowing, 2, batches, setup.config(stage))
    for result in results:
        same_trace(result["trace"], trace)
        assert_close(result["state"], twin.state(), "fp16", setup.twin(seeded(Mlp)).state())
    said = [line for line in results[0]["lines"] if "skip" in line.lower()]
    assert len(said) == 2
    assert "128" in said[1] and "4" in said[1]  # the new scale; the step, counted from 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_without_a_scale_infinities_skip_too(ranks, name, stage, dtype):
    """One WARNING on rank 0 for each; weights and optimizer state as if the step had not been."""
    more = {"optimizer": {"type": name, "params": OPTIMIZERS[name][0]}}
    setup = Setup(dtype, more=more)
    batches = spread(regression, 5, setup, 2)
    for step in (0, 2):  # the very first, before there is any momentum, and a later one
        x, y = batches[step][0][1]
        batches[step][0][1] = (x * float("inf"), y)
    before = setup.twin(seeded(Mlp)).state()
    twin, _ = run_twin(name, setup, batches, gamma=1.0)
    assert twin.skipped == 2
    results = ranks(skipping, 2, batches, setup.config(stage))
    for rank, (state, skipped, lines) in enumerate(results):
        assert skipped == 2
        assert_close(state, twin.state(), dtype, before)
        assert sum("skip" in line.lower() for line in lines) == (2 if rank == 0 else 0), lines


def skipping(batches, config):
    import shardline

    rank = dist.get_rank()
    handler = Lines()
    logging.getLogger("shardline").addHandler(handler)
    engine, *_ = shardline.initialize(model=seeded(Mlp), config=config)
    for window in batches:
        engine.backward(mse(engine, engine.module, window[0][rank]))
        engine.step()
    result = engine.full_state_dict(), engine.skipped_steps, handler.lines
    engine.destroy()
    logging.getLogger("shardline").removeHandler(handler)
    return result


def test_static_scale(ranks):
    """A static scale never moves; an overflow under it still skips."""
    more = {"fp16": {"enabled": True, "loss_scale": 64}, **setup_for("SGD").more}
    setup = Setup("fp16", "SGD", more=more)
    batches = spread(regression, 4, setup, 2)
    x, y = batches[1][0][0]
    batches[1][0][0] = (x * 1e30, y)
    for result in ranks(overflowing, 2, batches, setup.config(2)):
        assert [scale for _, scale, _ in result["trace"]] == [64] * 4
        assert result["skipped"] == 1 and result["finite"]


def test_the_scale_grows_after_a_window(ranks):
    setup = Setup("fp16", "SGD", scale_power=4, window=2, more=setup_for("SGD").more)
    batches = spread(regression, 5, setup, 2)
    for result in ranks(overflowing, 2, batches, setup.config(1)):
        assert [scale for _, scale, _ in result["trace"]] == [16, 32, 32, 64, 64]
