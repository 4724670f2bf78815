"""Ranks that disagree are found at `initialize` and named, on every rank, before anything can hang."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.harness import STAGES, Setup, seeded
from tests.models import Mlp


def another_config(config):
    return seeded(Mlp), config | {"gradient_clipping": 0.5}


def another_rate(config):
    return seeded(Mlp), config | {"optimizer": {"type": "AdamW", "params": {"lr": 0.3}}}


def another_stage(config):
    return seeded(Mlp), config | {"zero_optimization": {**config["zero_optimization"], "stage": 1}}


def another_shape(config):
    model = seeded(Mlp)
    model.head = nn.Linear(32, 33)
    return model, config


def one_more_parameter(config):
    model = seeded(Mlp)
    model.extra = nn.Parameter(torch.zeros(3))
    return model, config


def another_name(config):
    model = seeded(Mlp)
    model.tail = model.head
    del model.head
    return model, config


def one_frozen(config):
    model = seeded(Mlp)
    model.blocks[1].up.weight.requires_grad_(False)
    return model, config


def another_torch(config):
    torch.__version__ = "9.9.9"
    return seeded(Mlp), config


DIFFERENCES = {
    f.__name__: f
    for f in (
        another_config,
        another_rate,
        another_stage,
        another_shape,
        one_more_parameter,
        another_name,
        one_frozen,
        another_torch,
    )
}

WORDS = {
    "another_config": "gradient_clipping",
    "another_rate": "lr",
    "another_stage": "stage",
    "another_shape": "head",
    "one_more_parameter": "number of parameters",
    "another_name": "head.weight",
    "one_frozen": "blocks.1.up.weight",
    "another_torch": "9.9.9",
}


def differ(what, who, config):
    import shardline

    version = torch.__version__
    model, config = DIFFERENCES[what](config) if dist.get_rank() == who else (seeded(Mlp), config)
    try:
        shardline.initialize(model=model, config=config)
    except shardline.errors.DisagreementError as error:
        return str(error)
    finally:
        torch.__version__ = version
    return None


@pytest.mark.parametrize("stage", [STAGES[0], STAGES[3]])
@pytest.mark.parametrize("what", DIFFERENCES)
def test_found_and_named(ranks, what, stage):
    for error in ranks(differ, 3, what, 2, Setup().config(stage), timeout=20):
        assert error is not None
        assert WORDS[what] in error
        assert "rank 2" in error.lower()
