"""Parameters and buffers without elements: they train, save and load as any others, wherever they lie."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.harness import STAGES, Setup, assert_identical, check_against_twin, start
from tests.models import regression


class Partly(nn.Module):
    """Some parameters, among them all of a block, have no elements."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that there is nothing to initialise
            self.down = nn.Linear(32, 0)
            self.blocks = nn.ModuleList([nn.Linear(0, 0), nn.Linear(32, 32)])
            self.up = nn.Linear(0, 32)
        self.none = nn.Parameter(torch.zeros(0, 4))
        self.register_buffer("empty", torch.zeros(0, 3))

    def forward(self, x):
        return self.blocks[1](x) + self.up(self.blocks[0](self.down(x))) + self.none.sum() + self.empty.sum()


class Wholly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.zeros(0))

    def forward(self, x):
        return x + self.first.sum() + self.second.sum()


def loss_of(call, module, batch):
    return F.mse_loss(call(batch[0]).float(), batch[1])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_some_without_elements(ranks, dtype):
    check_against_twin(ranks, Partly, loss_of, regression, setup=Setup(dtype, clip=0.5), steps=2)


def saved(build, configs, folder):
    found = []
    for i, config in enumerate(configs):
        engine = start(build, config)
        engine.backward(loss_of(engine, engine.module, regression(4)))
        engine.step()
        engine.save_checkpoint(f"{folder}/{i}")
        found.append((engine.full_state_dict(), float(engine.get_global_grad_norm())))
        engine.destroy()
    return found


def loaded(build, configs, folder):
    found = []
    for i, config in enumerate(configs):
        engine = start(build, config)
        engine.load_checkpoint(f"{folder}/{i}")
        found.append(engine.full_state_dict())
        engine.destroy()
    return found


@pytest.mark.parametrize("build", [Partly, Wholly])
def test_checkpoints_at_another_world(ranks, tmp_path, build):
    configs = [Setup(clip=0.5).config(stage) for stage in STAGES]
    (before, *_) = ranks(saved, 2, build, configs, str(tmp_path))
    for after in ranks(loaded, 3, build, configs[::-1], str(tmp_path)):
        for (state, norm), again in zip(before, after, strict=True):
            assert_identical(again, state)
            assert (norm == 0.0) == (build is Wholly)
