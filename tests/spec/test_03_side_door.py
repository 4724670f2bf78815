"""Side door: tensors that need a weight leave its module by ways that output hooks do not see."""

from __future__ import annotations

import pytest

from tests.harness import Setup, check_against_twin
from tests.models import (
    AuxMlp,
    Mlp,
    OpaqueMlp,
    ViewMlp,
    aux_loss,
    encode_loss,
    gradient_penalty,
    mse,
    opaque_loss,
    regression,
)

DOORS = {
    "auxiliary loss kept on self": (AuxMlp, aux_loss),
    "unregistered dataclass": (OpaqueMlp, opaque_loss),
    "view changed in place": (ViewMlp, mse),
    "gradient penalty": (Mlp, gradient_penalty),
    "encode without forward": (Mlp, encode_loss),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_equal_to_the_twin_at_every_stage(ranks, door, accumulation):
    build, loss_of = DOORS[door]
    check_against_twin(ranks, build, loss_of, regression, setup=Setup(accumulation=accumulation))


@pytest.mark.parametrize("door", [d for d in DOORS if d != "gradient penalty"])
def test_in_bf16(ranks, door):
    """Not the penalty: a second derivative in bf16 is noise."""
    build, loss_of = DOORS[door]
    check_against_twin(ranks, build, loss_of, regression, setup=Setup("bf16", "SGD"), stages=(2, 3))


@pytest.mark.parametrize("door", DOORS)
def test_on_a_single_process(ranks, door):
    build, loss_of = DOORS[door]
    check_against_twin(ranks, build, loss_of, regression, world=1, stages=(0, 3))
