"""Accumulation windows: what a backward is divided by, whatever number of `step()` calls lies between."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.harness import Setup, assert_close, seeded, start
from tests.models import Mlp, regression

ACCUMULATION, WINDOWS = 4, 2
PLAIN_SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


def batch(window, micro, rank):
    return regression(4, seed=100 * window + 10 * micro + rank + 1)


def losses_of(model, x, y, losses):
    """One loss, or that loss in two parts."""
    out = model(x).float()
    parts = F.mse_loss(out, y), 0.5 * out.square().mean()
    return parts if losses == 2 else (parts[0] + parts[1],)


def windows_by_hand(config, backwards, losses, how):
    """``backwards`` micro-batches for each call of ``step``, and a window of ACCUMULATION of them."""
    rank = dist.get_rank()
    engine = start(Mlp, config)
    told = []
    engine.events.subscribe(told.append)
    for window in range(WINDOWS):
        for micro in range(ACCUMULATION):
            last = micro + 1 == ACCUMULATION
            if how == "set":
                engine.set_gradient_accumulation_boundary(last)
            parts = losses_of(engine, *batch(window, micro, rank), losses)
            for part in parts:
                engine.backward(part, retain_graph=part is not parts[-1])
            if (micro + 1) % backwards == 0:
                engine.step(boundary=last if how == "argument" else None)
    counted = engine.global_steps, engine.micro_steps, engine.global_samples
    done = [(float(event.loss), event.samples) for event in told if type(event).__name__ == "StepDone"]
    state = engine.full_state_dict()
    engine.destroy()
    return state, counted, done


def by_formula(world):
    """Plain torch: a step of SGD by the mean over ranks of the sum over micro-steps of each gradient over four."""
    model = seeded(Mlp)
    means = []
    for window in range(WINDOWS):
        model.zero_grad()
        means.append([0.0] * world)
        for micro in range(ACCUMULATION):
            for rank in range(world):
                (loss,) = losses_of(model, *batch(window, micro, rank), 1)
                (loss / ACCUMULATION / world).backward()
                means[-1][rank] += loss.item() / ACCUMULATION
        with torch.no_grad():
            for param in model.parameters():
                param -= 0.1 * param.grad
    return model.state_dict(), means


@pytest.mark.parametrize("losses", [1, 2])
@pytest.mark.parametrize("backwards", [4, 2, 1])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_window_that_the_caller_ends_is_a_sum(ranks, stage, backwards, losses) -> None:
    """Accelerate steps once a window, DeepSpeed once a micro-batch: both say where the window ends."""
    config = Setup(accumulation=ACCUMULATION, more=PLAIN_SGD).config(stage)
    expected, means = by_formula(2)
    for how in ("set", "argument"):
        for state, counted, done in ranks(windows_by_hand, 2, config, backwards, losses, how):
            assert_close(state, expected)
            assert counted == (WINDOWS, WINDOWS * ACCUMULATION, WINDOWS * ACCUMULATION * 4 * 2)
            assert done == [(pytest.approx(sum(mean) / 2, rel=1e-5), 32) for mean in means]


def a_sum_in_one_micro_step(config):
    """Two backwards in each of the micro-steps that the engine counts."""
    engine = start(Mlp, config)
    for micro in range(2):
        for part in (0, 1):
            engine.backward(F.mse_loss(engine(batch(0, micro, part)[0]), batch(0, micro, part)[1]))
        engine.step()
    result = engine.full_state_dict(), engine.global_steps, engine.micro_steps
    engine.destroy()
    return result


def test_several_backwards_of_a_micro_step_are_a_sum(ranks) -> None:
    model = seeded(Mlp)
    for micro in range(2):
        for part in (0, 1):
            (F.mse_loss(model(batch(0, micro, part)[0]), batch(0, micro, part)[1]) / 2).backward()
    expected = {name: (param - 0.1 * param.grad).detach() for name, param in model.named_parameters()}
    config = Setup(accumulation=2, more=PLAIN_SGD)
    for state, steps, micro_steps in ranks(a_sum_in_one_micro_step, 1, config.config(0)):
        assert_close(state, expected)
        assert (steps, micro_steps) == (1, 2)


def weighted_and_ended(config):
    """Losses that are sums, a window of three of four micro-steps that the caller ends."""
    engine = start(Mlp, config)
    for micro in range(3):
        x, y = batch(0, micro, dist.get_rank())
        engine.backward(F.mse_loss(engine(x), y, reduction="sum"))
        engine.step(weight=y.numel(), boundary=micro == 2)
    state = engine.full_state_dict()
    engine.destroy()
    return state


def test_weights_that_the_caller_gives_win(ranks) -> None:
    model = seeded(Mlp)
    x, y = (torch.cat([batch(0, m, r)[i] for m in range(3) for r in range(2)]) for i in range(2))
    F.mse_loss(model(x), y).backward()
    expected = {name: (param - 0.1 * param.grad).detach() for name, param in model.named_parameters()}
    for state in ranks(weighted_and_ended, 2, Setup(accumulation=4, more=PLAIN_SGD).config(2)):
        assert_close(state, expected)


def own_loader_ended_by_hand(config):
    """The engine's own loader, whose last global batch is smaller, under boundaries that the caller sets."""
    import shardline

    x, y = regression(14, seed=5)
    data = torch.utils.data.TensorDataset(x, y)
    engine, _, loader, _ = shardline.initialize(model=seeded(Mlp), training_data=data, config=config)
    for micro, (inputs, targets) in enumerate(loader):
        engine.set_gradient_accumulation_boundary(micro % 2 == 1)
        engine.backward(F.mse_loss(engine(inputs), targets))
        if micro % 2 == 1:
            engine.step()
    result = engine.full_state_dict(), engine.global_samples, engine.global_steps
    engine.destroy()
    return result


def test_the_engines_loader_weights_and_counts_windows_that_the_caller_ends(ranks) -> None:
    """8 and 6 samples over two ranks and two micro-steps: each step is the mean over its samples, as without."""
    more = PLAIN_SGD | {"data_loader": {"uneven": True, "shuffle": False}}
    config = Setup(accumulation=2, micro=2, more=more).config(1)
    model, (x, y) = seeded(Mlp), regression(14, seed=5)
    for part in (slice(0, 8), slice(8, 14)):
        model.zero_grad()
        F.mse_loss(model(x[part]), y[part]).backward()
        with torch.no_grad():
            for param in model.parameters():
                param -= 0.1 * param.grad
    for state, samples, steps in ranks(own_loader_ended_by_hand, 2, config):
        assert_close(state, model.state_dict())
        assert (samples, steps) == (14, 2)
