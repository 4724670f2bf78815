"""An `initialize` that fails leaves model and optimizer as they were, so that a corrected call works."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardline
from tests.harness import Setup, assert_identical, seeded
from tests.models import Mlp, mse, regression


class Parts(Mlp):
    """With what is rounded or moved on the way: a frozen weight, buffers, a weight tied to another."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3, bias=False).requires_grad_(False)
        self.register_buffer("scale", torch.tensor([1.0, 1.001]))
        self.again = self.head


class Scaled(nn.Module):
    """On `meta` it cannot be known what its constructor wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(32, 32), nn.Parameter(torch.full((32,), 0.5))

    def forward(self, x):
        return self.first(x) * self.scale


def fails(error, ranks=(0, 1, 2)):
    def schedule(optimizer):
        if dist.get_rank() in ranks:
            raise error
        return torch.optim.lr_scheduler.StepLR(optimizer, 1)

    return schedule


def look(model, optimizer):
    """What must be as before: values, classes, hooks, and the optimizer."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [(name, type(param), param.requires_grad, id(param)) for name, param in model.named_parameters()],
        [
            len(hooks)
            for module in model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks, vars(module))
        ],
        [{**group, "params": [id(param) for param in group["params"]]} for group in optimizer.param_groups],
        sorted(vars(optimizer)),
        len(optimizer.state),
    )


def train(engine):
    for step in range(2):
        batch = regression(4, seed=10 * step + engine.global_rank)
        engine.backward(mse(engine, engine.module, batch))
        engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return state


def corrected(config, folder, kind):
    """After each failure: what was said, whether all is as before, and what a corrected call trains to."""
    faults = {
        "early": {"config": config | {"no_such_key": 1}},
        "stranger": {"model_parameters": [nn.Parameter(torch.zeros(2))], "optimizer": None},
        "late": {"lr_scheduler": fails(KeyError("rate"))},
        "late, on one rank": {"lr_scheduler": fails(ValueError("no rate"), ranks=(1,))},
        "last of all": {"config": config | {"checkpoint": {"dir": folder, "resume": "no_such_tag"}}},
    }
    if dist.get_world_size() == 1:
        del faults["late, on one rank"]
    found = {}
    for name, fault in faults.items():
        model = seeded(Parts)
        optimizer = kind(model.parameters(), lr=0.1)
        before, given = look(model, optimizer), {"optimizer": optimizer, "config": config}
        said = None
        for _ in range(2):
            try:
                shardline.initialize(model=model, **(given | fault))
            except Exception as error:
                said = type(error).__name__, str(error), getattr(error, "__notes__", [])
        after = look(model, optimizer)
        frozen = before[0].pop("frozen.weight"), after[0].pop("frozen.weight")
        assert_identical(after[0], before[0])
        assert after[1:] == before[1:], name
        found[name] = said, frozen, train(shardline.initialize(model=model, **given)[0])
    model = seeded(Parts)
    whole = train(shardline.initialize(model=model, optimizer=kind(model.parameters(), lr=0.1), config=config)[0])
    return found, whole


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_a_corrected_call_works(ranks, tmp_path, world, stage, dtype) -> None:
    config = Setup(dtype).config(stage)
    del config["optimizer"]
    kind = torch.optim.AdamW if stage else torch.optim.Adagrad  # which has a state from the start
    for rank, (found, whole) in enumerate(ranks(corrected, world, config, str(tmp_path), kind)):
        kinds = {name: said[0] for name, (said, _, _) in found.items()}
        alone = "ValueError" if rank == 1 else "DisagreementError"
        assert kinds == {
            "early": "ConfigError",
            "stranger": "OptimizerError",
            "late": "KeyError",
            **({"late, on one rank": alone} if world > 1 else {}),
            "last of all": "CheckpointError",
        }
        if world > 1:
            assert "no rate" in found["late, on one rank"][0][1] and (
                rank or "rank 1" in found["late, on one rank"][0][1]
            )
        for name, ((_, _, notes), (before, after), state) in found.items():
            rounded = dtype == "bf16" and name.startswith("la")
            assert any("frozen.weight" in note for note in notes) == rounded, name
            assert torch.equal(after, before.bfloat16().float() if rounded else before), name
            assert_identical(state, whole)


def filled_at_last(config):
    """A model on `meta`: the first call cannot fill it, the second one raises while it does, the third can."""

    def half(module):
        if isinstance(module, Scaled):
            with torch.no_grad():
                module.scale.fill_(0.25)
            raise ValueError("not yet")

    def ones(module):
        if isinstance(module, Scaled):
            with torch.no_grad():
                module.scale.fill_(0.25)

    with torch.device("meta"):
        model = Scaled()
    said, where = [], []
    for init_fn in (None, half) if dist.get_world_size() == 1 else (None, None):
        try:
            shardline.initialize(model=model, config=config, init_fn=init_fn)
        except (shardline.ShardlineError, ValueError) as error:
            said.append(str(error))
        where.append({(str(param.device), type(param).__name__) for param in model.parameters()})
    torch.manual_seed(3)
    engine = shardline.initialize(model=model, config=config, init_fn=ones)[0]
    state = train(engine)
    torch.manual_seed(3)
    with torch.device("meta"):
        model = Scaled()
    return said, where, state, train(shardline.initialize(model=model, config=config, init_fn=ones)[0])


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 0), (2, 3)])
def test_a_model_on_meta_is_there_again(ranks, world, stage) -> None:
    for said, where, state, expected in ranks(filled_at_last, world, Setup(optimizer="SGD").config(stage)):
        assert "scale" in said[0] and said[1] == ("not yet" if world == 1 else said[0])
        assert where == [{("meta", "Parameter")}] * 2
        assert_identical(state, expected)
