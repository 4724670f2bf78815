"""Weights that are gathered for the user: changes with and without write."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.engine.cases import SGD, attempt, is_sentence
from tests.harness import Setup, start
from tests.models import Mlp, mse, regression


def change_without_write(config):
    engine = start(Mlp, config)

    def change():
        with engine.gathered_parameters(), torch.no_grad():
            engine.module.head.bias.add_(1.0)

    said = attempt(change)
    engine.destroy()
    return said


@pytest.mark.parametrize("stage", [*(stage for stage in (0, 1, 2)), 3])
def test_a_change_without_write_raises(ranks, stage) -> None:
    for said in ranks(change_without_write, 2, SGD.config(stage)):
        assert is_sentence(said, "UsageError", "'head.bias'", "write=True")


def change_small_without_write(config):
    """At stage 3 with the default threshold, small units rest whole; ranks change them differently."""
    engine = start(Mlp, config)

    def change():
        with engine.gathered_parameters(), torch.no_grad():
            engine.module.head.bias.fill_(float(dist.get_rank()))

    said = attempt(change)
    state = engine.full_state_dict()["head.bias"]
    here = engine.module.head.bias.detach().clone() if said is None else None
    engine.destroy()
    return said, state, here


def test_a_change_of_a_kept_unit_without_write_raises(ranks) -> None:
    config = Setup("fp32", "SGD", zero={"stage3_param_persistence_threshold": 10_000}).config(3)
    for said, _, _ in ranks(change_small_without_write, 2, config):
        assert is_sentence(said, "UsageError", "'head.bias'", "write=True")


def nothing_written(config):
    """Looking in between forward and backward, with the right to write but without doing so."""
    engine = start(Mlp, config)
    loss = mse(engine, engine.module, regression(4))
    with engine.gathered_parameters(write=True):
        engine.module.head.bias.sum().item()
    said = attempt(engine.backward, loss)
    engine.destroy()
    return said


@pytest.mark.parametrize(
    "stage",
    [1, 3],
)
def test_looking_with_write_between_forward_and_backward(ranks, stage) -> None:
    for said in ranks(nothing_written, 2, SGD.config(stage)):
        assert said is None
