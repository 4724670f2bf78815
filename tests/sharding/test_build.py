"""From a model to units: groups, layout, first values, and a new layout when what is trained changes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardline.comm import Comm
from shardline.config import load_config
from shardline.errors import DisagreementError, OptimizerError
from shardline.plan.placement import STAGES
from shardline.sharding.averages import Averages
from shardline.sharding.build import (
    group_parameters,
    lay_out,
    lay_out_again,
    load_model,
    needs_full_params,
    new_optimizer,
    take_over,
)
from shardline.sharding.fragments import full_weights
from shardline.sharding.precision import Precision
from tests.harness import seeded
from tests.models import Lora, Mlp, TinyGpt

CPU = torch.device("cpu")


def settings(stage=1, **zero):
    zero = {"stage": stage, "unit_min_numel": 1, "stage3_param_persistence_threshold": 0} | zero
    return load_config({"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}, 1)


def build(model, stage=1, *, whole=False, comm=None, groups=None, compute=torch.float32, **zero):
    comm = comm or Comm(dist.group.WORLD if dist.is_initialized() else None, CPU)
    groups = {name: 0 for name, _ in model.named_parameters()} if groups is None else groups
    precision = Precision(compute=compute)
    config = settings(stage, **zero)
    layout = lay_out(model, config, precision, comm, groups, param_aligned=whole, on_sealed_access=lambda unit: False)
    load_model(model, layout, precision, comm)
    return layout, config, precision, comm


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --- groups -----------------------------------------------------------------------------------------------------------


def test_groups_by_first_name() -> None:
    model = TinyGpt()
    rest = [p for name, p in model.named_parameters() if name != "embed.weight"]
    groups = group_parameters(model, [{"params": rest}, {"params": [model.head.weight]}])
    assert groups["embed.weight"] == 1 and groups["position"] == 0 and "head.weight" not in groups


def test_a_parameter_in_two_groups_is_named() -> None:
    model = Mlp()
    with pytest.raises(OptimizerError, match=r"'head\.weight' is in param groups 0 and 1"):
        group_parameters(model, [{"params": [model.head.weight]}, {"params": [model.head.weight]}])


def test_a_stranger_is_refused() -> None:
    with pytest.raises(OptimizerError, match=r"param group 0 holds a tensor of shape \(3,\).*not a parameter"):
        group_parameters(Mlp(), [{"params": [nn.Parameter(torch.zeros(3))]}])


# --- who needs whole parameters ---------------------------------------------------------------------------------------


class Together(torch.optim.SGD):
    shardline_kind = "global"


class Each(torch.optim.SGD):
    shardline_kind = "per_parameter"


def test_needs_full_params() -> None:
    p = [nn.Parameter(torch.zeros(2))]
    assert not needs_full_params(torch.optim.AdamW(p), STAGES[3], 4)
    assert needs_full_params(Each(p), STAGES[3], 4)
    assert needs_full_params(Together(p), STAGES[0], 4) and needs_full_params(Together(p), STAGES[3], 1)
    with pytest.raises(OptimizerError, match=r"Together needs all parameters.*stage 2.*Use stage 0"):
        needs_full_params(Together(p), STAGES[2], 4)


# --- first values -----------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_as_it_is() -> None:
    model = TinyGpt()
    before = values(model)
    layout, *_ = build(model, 3)
    assert all(torch.equal(p.detach(), before[name]) for name, p in model.named_parameters())
    assert model.head.weight is model.embed.weight
    masters = {run.param.data_ptr() for run in layout.runs}
    assert len(masters) == len(layout.runs) == len(layout.units)
    unit, bucket, entry = layout.where("position")
    assert unit.name == "(model)" and entry.param.name == "position" and bucket in unit.buckets


def test_gradients_from_before_are_gone() -> None:
    model = Mlp()
    model(torch.ones(1, 32)).sum().backward()
    build(model)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("compute", "alone"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, False)])
def test_buckets_of_their_own_are_for_gradients_that_need_no_cast(monkeypatch, compute, alone) -> None:
    monkeypatch.setattr("shardline.plan.plan._OWN_BUCKET_NUMEL", 64)
    layout, *_, comm = build(Mlp(depth=2), compute=compute)
    large = [p.name for p in layout.plan.params if p.numel >= 64]
    assert len(large) > 2
    for name in large:
        entries = layout.where(name)[1].plan.entries
        assert (len(entries) == 1) is alone, name
    comm.close()


def test_small_units_rest_whole_at_stage_3() -> None:
    block = sum(p.numel() for p in Mlp().blocks[0].parameters())
    layout, *_ = build(Mlp(), 3, stage3_param_persistence_threshold=block)
    assert [unit.stage.number for unit in layout.units] == [3, 3, 3, 3, 2]
    assert [unit.stage.number for unit in build(Mlp(), 1, stage3_param_persistence_threshold=block)[0].units] == [1] * 5


def test_whole_runs_have_the_shapes_of_parameters() -> None:
    layout, *_ = build(Mlp(depth=1), 1, whole=True)
    assert [tuple(run.param.shape) for run in layout.runs] == [tuple(p.shape) for p in Mlp(depth=1).parameters()]


class Expanded(nn.Module):
    """A buffer whose rows share their memory, as masks and position tables are often made."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4.0).expand(3, 4))
        self.register_buffer("count", torch.tensor(dist.get_rank() if dist.is_initialized() else 0))

    def forward(self, x):
        return self.linear(x)


def load_expanded():
    try:
        model = Expanded()
        _, _, _, comm = build(model)
        comm.close()
        return model.table.clone(), int(model.count), None
    except Exception as error:
        return None, None, f"{type(error).__name__}: {error}"


def test_expanded_buffers(ranks) -> None:
    for table, count, error in ranks(load_expanded, 2):
        assert error is None
        assert torch.equal(table, torch.arange(4.0).repeat(3, 1)) and count == 0


def load_with_statistics():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(dist.get_rank() + 1)
    layout, _, _, comm = build(model, 3)
    whole = [float(t.sum()) / t.numel() for unit in layout.units for _, t in full_weights(unit)]
    buffers = [float(b.double().mean()) for b in model.buffers()]
    comm.close()
    return whole, buffers


def test_values_and_statistics_of_rank_0_win(ranks) -> None:
    for whole, buffers in ranks(load_with_statistics, 2):
        assert set(whole) == {1.0} and set(buffers) == {1.0}


def build_different():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4 + dist.get_rank()))
    comm = Comm(dist.group.WORLD, CPU)
    try:
        build(model, comm=comm)
    except DisagreementError as error:
        return str(error)
    finally:
        comm.close()
    return None


def test_models_that_differ_are_named(ranks) -> None:
    for said in ranks(build_different, 2):
        assert "'1.weight'" in said and "[4, 4]" in said and "[5, 4]" in said


# --- optimizers on runs -----------------------------------------------------------------------------------------------


def test_a_new_optimizer_keeps_options_by_group() -> None:
    model = Mlp(depth=2)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.5}, {"params": rest, "lr": 0.25}]
    layout, *_ = build(model, groups=group_parameters(model, groups))
    optimizer = new_optimizer("SGD", {"lr": 1.0}, groups, layout)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(1.0, 0.5), (0.25, 0)]
    for group, members in zip(optimizer.param_groups, (decay, rest), strict=True):
        assert sum(p.numel() for p in group["params"]) >= sum(p.numel() for p in members)
        assert len(group["params"]) == len(layout.units)


def test_an_optimizer_is_taken_over_in_place() -> None:
    model = Mlp(depth=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    layout, *_ = build(model)
    take_over(optimizer, layout)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(run.param) for run in layout.runs]


# --- lay_out_again ---------------------------------------------------------------------------------------------------


def freeze_and_unfreeze(stage):
    """Step, freeze, step, unfreeze, step: the state of what was frozen waits as it was."""
    model = seeded(lambda: Lora(64, 2, 2))
    model.blocks[0].base.weight.requires_grad_(True)
    layout, *settled = build(model, stage, compute=torch.bfloat16)
    groups = {name: 0 for name, _ in model.named_parameters()}
    optimizer = new_optimizer("Adam", {"lr": 0.1}, [{"params": list(model.parameters())}], layout)
    waiting, seen = {}, []
    before = {entry.param.name: t.clone() for unit in layout.units for entry, t in full_weights(unit)}
    name = "blocks.0.base.weight"
    for trains in (True, False, True):
        if layout.params[name].requires_grad != trains or not seen:
            layout.params[name].requires_grad_(trains)
            layout = lay_out_again(
                layout, *settled, optimizer, groups, waiting, Averages(), lambda unit: False, param_aligned=False
            )
        for run in layout.runs:
            run.param.grad = torch.ones_like(run.param)
        optimizer.step()
        seen.append((name in waiting, sum(run.param.numel() for run in layout.runs)))
    after = {entry.param.name: t.clone() for unit in layout.units for entry, t in full_weights(unit)}
    order = [spec.name for spec in layout.plan.params]
    settled[-1].close()
    return seen, before, after, order


@pytest.mark.parametrize(("world", "stage"), [(1, 1), (2, 1), (2, 3)])
def test_regroup_keeps_weights_and_states(ranks, world, stage) -> None:
    """Adam with constant gradients moves by the learning rate each step, if and only if its moments are kept."""
    name = "blocks.0.base.weight"
    for seen, before, after, order in ranks(freeze_and_unfreeze, world, stage):
        assert [waiting for waiting, _ in seen] == [False, True, False]
        assert seen[1][1] < seen[0][1]
        assert set(order) == set(before)
        for key, value in before.items():
            steps = 2 if key == name else 0 if "base" in key else 3
            torch.testing.assert_close(after[key].float(), value.float() - 0.1 * steps, rtol=0, atol=2e-3)
