import inspect

import pytest
import torch
import torch._dynamo  # an optimizer imports it, and it sets an environment variable: not inside a test

from shardline import optim as optimizer
from shardline.config.params import OPTIMIZERS, SCHEDULERS, known
from shardline.optim import lr


def defaults(model):
    return {name: field.default for name, field in model.model_fields.items() if not field.is_required()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_take_what_the_configuration_lets_through(name):
    groups = [{"params": [torch.zeros(3, requires_grad=True)]}]
    built = optimizer.build(name, defaults(OPTIMIZERS[name]), groups)
    group = built.param_groups[0]
    for key, value in defaults(OPTIMIZERS[name]).items():
        if key in group and value is not None:
            assert group[key] == value, key
    plain = optimizer.build(name, {}, groups).param_groups[0]
    for key, value in defaults(OPTIMIZERS[name]).items():
        if key in plain and value is not None:
            assert plain[key] == value, f"the documented default of {key} is not the real one"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_have_the_documented_parameters(name):
    parameters = list(inspect.signature(getattr(lr, name)).parameters.values())[1:]
    model = SCHEDULERS[name]
    assert {parameter.name for parameter in parameters} == set(model.model_fields)
    for parameter in parameters:
        field = model.model_fields[parameter.name]
        assert field.is_required() == (parameter.default is parameter.empty)
        assert field.is_required() or field.default == parameter.default, parameter.name


def test_names_are_compared_without_case():
    assert known(OPTIMIZERS, "adamW") is OPTIMIZERS["AdamW"]
    assert known(SCHEDULERS, "warmuplr") is SCHEDULERS["WarmupLR"]
    assert known(OPTIMIZERS, "RMSprop") is None and known(OPTIMIZERS, None) is None
