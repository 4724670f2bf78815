"""What a loop for plain PyTorch leaves in: a GradScaler, a division, the scheduler's step. Each is told once."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from tests.harness import Setup, assert_close, seeded, start
from tests.models import Mlp, mse, regression

PLAIN = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


def notices(engine):
    told = []
    engine.events.subscribe(lambda event: told.append(event.message) if hasattr(event, "message") else None)
    return told


def by_hand(steps, accumulation=1):
    model = seeded(Mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(accumulation):
            (mse(model, model, regression(4, seed=10 * step + micro)) / accumulation).backward()
        optimizer.step()
    return model.state_dict()


def with_a_scaler(config, how):
    engine = start(Mlp, config)
    told = notices(engine)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = []
    for step in range(3):
        loss = scaler.scale(mse(engine, engine.module, regression(4, seed=10 * step)))
        losses.append(float(engine.backward(loss)))
        if how == "unscaled" and not step:
            scaler.unscale_(engine.optimizer)
        engine.step()
    said = None
    try:
        scaler.step(engine.optimizer)
    except Exception as error:
        said = type(error).__name__, str(error)
    result = engine.full_state_dict(), told, losses, said
    engine.destroy()
    return result


@pytest.mark.parametrize("how", ["alone", "unscaled"])
@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 3)])
def test_a_scaler_is_taken_out_again(ranks, world, stage, how) -> None:
    for state, told, losses, said in ranks(with_a_scaler, world, Setup(more=PLAIN).config(stage), how):
        assert_close(state, by_hand(3))
        assert len(told) == 1 and "GradScaler" in told[0]
        assert max(losses) < 10, "the loss is reported with its scale"
        assert said[0] == "UsageError" and "engine.step()" in said[1], said


def plain_backward_of_a_scaled_loss(config):
    """Nothing tells what a plain backward came from: the notice names what may be wrong, once."""
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu", init_scale=2.0)):
        engine = start(Mlp, config)
        told = notices(engine)
        for step in range(2):
            loss = mse(engine, engine.module, regression(4, seed=10 * step))
            (loss if scaler is None else scaler.scale(loss)).backward()
            engine.step()
        engine.destroy()
        found.append(told)
    return found


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 3)])
def test_a_scaler_around_a_plain_backward_is_named(ranks, world, stage) -> None:
    for without, disabled, told in ranks(plain_backward_of_a_scaled_loss, world, Setup(more=PLAIN).config(stage)):
        assert not without and not disabled
        assert len(told) == 1 and "GradScaler" in told[0] and "engine.backward(loss)" in told[0]


def divided(config, by):
    engine = start(Mlp, config)
    told = notices(engine)
    for step in range(2):
        for micro in range(4):
            engine.backward(mse(engine, engine.module, regression(4, seed=10 * step + micro)) / by)
            engine.step()
    engine.destroy()
    return told


def test_a_loss_that_is_divided_twice_is_told_once(ranks) -> None:
    config = Setup(accumulation=4, more=PLAIN).config(1)
    assert [["4 already" in each for each in told] for told in ranks(divided, 1, config, 4)] == [[True]]
    assert ranks(divided, 1, config, 3) == [[]]
    assert ranks(divided, 1, Setup(accumulation=1, more=PLAIN).config(1), 4) == [[]]


def scheduled(config, twice):
    import shardline

    model = seeded(Mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = StepLR(optimizer, 1, gamma=0.5)
    engine, *_ = shardline.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    told = notices(engine)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            engine.backward(mse(engine, engine.module, regression(4)))
            engine.step()
            if twice:
                scheduler.step()
    rate = engine.get_lr()
    engine.destroy()
    with warnings.catch_warnings(record=True) as after:
        warnings.simplefilter("always")
        mse(model, model, regression(4)).backward()
        optimizer.step()  # the optimizer's own again, as the scheduler knows it
        scheduler.step()
    return told, [str(each.message) for each in [*seen, *after]], rate


def test_a_scheduler_of_before_initialize(ranks) -> None:
    """It warns of nothing, and one notice says that its step was left in the loop."""
    config = Setup().config(0)
    del config["optimizer"]
    assert ranks(scheduled, 1, config, False) == [([], [], [0.125])]
    ((told, warned, _),) = ranks(scheduled, 1, config, True)
    assert len(told) == 1 and "scheduler.step()" in told[0] and warned == []
