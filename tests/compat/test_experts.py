"""``deepspeed.moe``: what scripts import, and the param groups that they make."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardline.compat.deepspeed as deepspeed
from shardline.errors import ModelError, UsageError
from tests.compat.rows import differs, unchanged
from tests.compat.test_engine import SHARDED


def make(**options):
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(8, 8), deepspeed.moe.layer.MoE(8, nn.Linear(8, 8), 2, **options))


def test_marks_and_groups():
    from shardline.compat.deepspeed.moe.utils import has_moe_layers, is_moe_param

    model = make(use_residual=True)
    assert has_moe_layers(model) == (True, 2)
    assert has_moe_layers(model[0]) == (False, 0)
    shared, experts = deepspeed.moe.utils.split_params_into_shared_and_expert_params(list(model.parameters()))
    assert {id(each) for each in experts} == {id(each) for each in model[1].experts.parameters()}
    assert all(map(is_moe_param, experts))
    split = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer
    groups = split({"params": model.parameters(), "name": "parameters", "lr": 0.5})
    assert [(len(group["params"]), group["lr"], group.get("moe", False)) for group in groups] == [
        (len(shared), 0.5, False),
        (len(experts), 0.5, True),
    ]
    assert deepspeed.moe.utils.is_moe_param_group(groups[1])


@differs("`MoE` with `ep_size` above 1", "experts in groups of ranks", "refused: stage 3 shards them over all ranks")
def test_refusals():
    with pytest.raises(ModelError, match="ep_size=2"):
        make(ep_size=2)
    with pytest.raises(ModelError, match="no tensor parallelism"):
        make(enable_expert_tensor_parallelism=True)
    with pytest.raises(UsageError, match="ep_size or mpu"):
        deepspeed.utils.groups.initialize(ep_size=2)
    deepspeed.utils.groups.initialize(ep_size=1)


@unchanged("`deepspeed.moe`", "top-1 and top-2 gating")
def test_gates_as_functions():
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    loss, combine, dispatch, counts = deepspeed.moe.sharded_moe.top1gating(logits, 1.0, 0, use_rts=False)
    gates = logits.softmax(1)
    assert counts.tolist() == [3, 1]
    assert combine.shape == (4, 2, 2)
    torch.testing.assert_close(combine[1, 0, 1], gates[1, 0])
    assert dispatch.nonzero().tolist() == [[0, 0, 0], [1, 0, 1], [2, 1, 0]]  # the last one does not fit
    torch.testing.assert_close(loss, (gates.mean(0) * torch.tensor([0.75, 0.25])).sum() * 2)
    _, combine, _, counts = deepspeed.moe.sharded_moe.top2gating(logits, 1.0, 0, top2_2nd_expert_sampling=False)
    assert counts.tolist() == [4, 4]
    torch.testing.assert_close(combine.sum((1, 2)), torch.ones(4))


def train(stage: int) -> list[float]:
    model = make(k=1, use_rts=False)
    groups = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "parameters"}
    )
    config = {
        "train_micro_batch_size_per_gpu": 6,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage, **SHARDED},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(4):
        output, balance, _ = engine(x)
        loss = F.mse_loss(output, x.roll(1)) + 0.1 * balance
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return losses


@unchanged("`deepspeed.moe`", "param groups of experts")
def test_param_groups_of_experts_train(ranks):
    every = [ranks(train, 2, stage)[0] for stage in (0, 3)]
    assert every[0][-1] < every[0][0]
    torch.testing.assert_close(every[0], every[1], rtol=1e-5, atol=0)
