"""What the graph of a loss says of a scaler or a division that was left in the loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardline.engine.loss_checks import grad_scale, is_divided_by, is_scaled_by
from tests.harness import Setup, assert_close, seeded, start
from tests.models import Mlp, mse, regression


@pytest.fixture
def loss():
    return nn.Linear(4, 4)(torch.ones(2, 4)).square().mean()


def test_the_scale_of_a_scaler_is_found(loss) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    for scaled in (scaler.scale(loss), scaler.scale(loss / 4), scaler.scale(loss) * 0.5, scaler.scale(loss).float()):
        scale = grad_scale(scaled)
        assert scale is not None and float(scale) == 512.0
        assert is_scaled_by(scaler.scale(loss), scale) and not is_scaled_by(loss, scale)


def test_no_other_factor_is_taken_for_one(loss) -> None:
    weight = nn.Parameter(torch.tensor(512.0))
    off = torch.amp.GradScaler("cpu", enabled=False)
    for other in (loss, loss * 512.0, loss * torch.tensor(512.0), loss * weight, loss * loss, off.scale(loss)):
        assert grad_scale(other) is None


def test_a_division_is_found(loss) -> None:
    for divided in (loss / 4, loss * 0.25, 0.25 * loss, (loss + loss) / 4, loss / torch.tensor(4), (loss / 4).double()):
        assert is_divided_by(divided, 4) and not is_divided_by(divided, 8)
    for other in (loss, 4 / loss, loss / 4 + loss, loss / loss):
        assert not is_divided_by(other, 4)


def scaled_already(config):
    engine = start(Mlp, config)
    for seed in range(2):
        back = engine.backward(mse(engine, engine.module, regression(4, seed=seed)) / 2, scale_wrt_gas=False)
        engine.step()
    state, shape = engine.full_state_dict(), (back.dim(), back.requires_grad)
    engine.destroy()
    return state, shape


def test_a_loss_that_is_divided_already(ranks) -> None:
    setup = Setup("fp32", "SGD", accumulation=2)
    twin = setup.twin(seeded(Mlp))
    for seed in range(2):
        twin.backward(mse(twin, twin.model, regression(4, seed=seed)))
    twin.step()
    for state, shape in ranks(scaled_already, 1, setup.config(1)):
        assert_close(state, twin.state())
        assert shape == (0, False)
