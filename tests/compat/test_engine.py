"""The engine under DeepSpeed's names, against plain torch."""

from __future__ import annotations

import argparse
import copy
import re
from argparse import Namespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import shardline.compat.deepspeed as deepspeed
from shardline.compat.deepspeed.engine import NOT_OFFERED
from shardline.errors import UsageError
from shardline.events import Scalars
from tests.compat.rows import unchanged
from tests.harness import is_whole

SHARDED = {"unit_min_numel": 0, "stage3_param_persistence_threshold": 0}


def make_net() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def batches(steps: int, rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(steps, 4, 8, generator=draw)
    return [(each, each.sum(1, keepdim=True)) for each in x]


def plain(world: int, windows: list[int], accumulation: int) -> dict[str, torch.Tensor]:
    """In one process: each window's gradient is the sum of its backwards, each over ``accumulation``."""
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    taken = [batches(sum(windows), rank) for rank in range(world)]
    step = 0
    for size in windows:
        for each in range(step, step + size):
            for own in taken:
                x, y = own[each]
                (F.mse_loss(net(x), y) / accumulation / world).backward()
        step += size
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return net.state_dict()


def as_accelerate(stage: int, windows: list[int], accumulation: int) -> tuple[dict[str, torch.Tensor], tuple[int, int]]:
    """A step only where a window ends, which may come early."""
    net = make_net()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage, **SHARDED},
    }
    adam = torch.optim.Adam(net.parameters(), lr=1e-2)
    engine, optimizer, _, _ = deepspeed.initialize(model=net, config_params=config, optimizer=adam)
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    assert isinstance(optimizer, deepspeed.DeepSpeedOptimizer)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is adam.param_groups
    data = iter(batches(sum(windows), dist.get_rank()))
    for size in windows:
        for micro in range(size):
            x, y = next(data)
            engine.set_gradient_accumulation_boundary(is_boundary=micro == size - 1)
            engine.backward(F.mse_loss(engine(x), y))
            if micro == size - 1:
                engine.step()
                assert not optimizer.overflow
    weights, counts = engine.full_state_dict(), (engine.global_steps, engine.micro_steps)
    engine.destroy()
    return weights, counts


@unchanged("a loop of one's own", "`initialize`, `backward`, `step`, boundaries set by hand")
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_windows_are_sums(ranks, stage):
    windows = [3, 3, 2, 1]
    expected = plain(2, windows, 3)
    for weights, counts in ranks(as_accelerate, 2, stage, windows, 3):
        assert counts == (4, 9)
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


def surface() -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    args = deepspeed.add_config_arguments(parser).parse_args(["--deepspeed"])
    with deepspeed.zero.Init(config_dict_or_path={}):
        net = make_net()
    with deepspeed.zero.GatheredParameters(net[0].weight, modifier_rank=1), torch.no_grad():
        if rank == 1:
            net[0].weight.fill_(0.5)  # before there is an engine
    assert is_whole(net[0].weight) == (world == 1)  # never whole on several ranks
    with deepspeed.zero.GatheredParameters(net.parameters()):
        assert torch.equal(net[0].weight, torch.full((16, 8), 0.5))
    assert deepspeed.utils.set_z3_leaf_modules(net, [nn.Tanh, "Linear"]) == list(net)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": 3, **SHARDED},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}},
    }
    engine, optimizer, loader, scheduler = deepspeed.initialize(args=args, model=net, config=config)
    assert (args.local_rank, loader) == (rank, None)
    assert scheduler is engine.lr_scheduler
    assert engine.config.get("zero_optimization", {}).get("stage") == 3
    assert (engine.loss_scale(), engine.gradient_clipping(), engine.optimizer_name()) == (1.0, 1.0, "adam")
    assert (engine.dp_world_size, engine.mp_world_size, engine.get_batch_info()) == (world, 1, (4 * world, 4, 1))
    weight = net[2].weight
    for x, y in batches(2, rank):
        engine.backward(F.mse_loss(engine(x).float(), y))
        optimizer.step()  # the engine's
    assert (engine.global_steps, engine.was_step_applied()) == (2, True)
    engine.global_steps = 7
    assert engine.global_steps == 7
    seen: list[object] = []
    engine.events.subscribe(seen.append)
    engine.monitor.write_events([("Train/accuracy", torch.tensor(0.5), engine.global_samples)])
    assert seen == [Scalars(7, {"Train/accuracy": 0.5})] and not engine.monitor.enabled

    whole = engine.full_state_dict()["2.weight"]
    assert torch.equal(deepspeed.utils.safe_get_full_fp32_param(weight), whole)
    assert not torch.equal(whole, whole.bfloat16().float())  # the masters
    value = torch.arange(256.0).reshape(16, 16) / 300
    deepspeed.utils.safe_set_full_fp32_param(weight, value)
    deepspeed.utils.safe_set_full_optimizer_state(weight, value * 2, "exp_avg")
    assert torch.equal(deepspeed.utils.safe_get_full_fp32_param(weight), value)
    assert torch.equal(deepspeed.utils.safe_get_full_optimizer_state(weight, "exp_avg"), value * 2)
    assert deepspeed.utils.safe_get_full_optimizer_state(weight, "absent") is None
    with deepspeed.zero.GatheredParameters([weight]):
        assert torch.equal(weight, value.bfloat16())
    with deepspeed.zero.GatheredParameters(weight, modifier_rank=1), torch.no_grad():
        if rank == 1:
            weight.fill_(0.25)
    found = deepspeed.utils.safe_get_full_fp32_param(weight)
    # A weight that comes back to what it was gets its master back, which rounds to it.
    assert torch.equal(found.bfloat16().float(), torch.full((16, 16), 0.25))

    listed = net.state_dict()
    assert {name: value.shape for name, value in listed.items()} == {
        name: value.shape for name, value in make_net().state_dict().items()
    }
    assert listed["2.weight"].is_meta
    with engine.gathered_parameters():
        assert not copy.deepcopy(net).state_dict()["2.weight"].is_meta
    state = engine._zero3_consolidated_16bit_state_dict()
    assert (state is None) == (rank != 0)
    assert state is None or {each.dtype for each in state.values()} == {torch.bfloat16}
    for name, reason in NOT_OFFERED.items():
        with pytest.raises(
            UsageError, match=re.escape(f"engine.{name} is not offered by Shardline's stand-in: {reason}")
        ):
            getattr(engine, name)(3)
    engine.destroy()


@unchanged(
    "a loop of one's own",
    "`zero.Init`, `GatheredParameters`, `safe_get/set_full_fp32_param`, `safe_get/set_full_optimizer_state`, "
    "`set_z3_leaf_modules`",
)
def test_the_rest_of_the_surface(ranks):
    ranks(surface, 2)


def saved(folder: str) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": 2},
    }
    net = make_net()
    engine, _, _, _ = deepspeed.initialize(model=net, config=config)
    for x, y in batches(2, dist.get_rank()):
        engine.backward(F.mse_loss(engine(x), y))
        engine.step()
    assert engine.save_checkpoint(folder, client_state={"epoch": 3})
    engine.save_16bit_model(folder)
    expected = engine.full_state_dict()
    other = make_net()
    engine.destroy()
    again, _, _, _ = deepspeed.initialize(model=other, config=config)
    assert again.load_checkpoint(f"{folder}/absent") == (None, None)
    path, client = again.load_checkpoint(folder, load_module_strict=True, load_lr_scheduler_states=True)
    assert path.endswith("global_step2")
    assert client["epoch"] == 3
    torch.testing.assert_close(again.full_state_dict(), expected, rtol=0, atol=0)
    again.destroy()
    if dist.get_rank() == 0:
        convert = deepspeed.utils.zero_to_fp32
        found = convert.get_fp32_state_dict_from_zero_checkpoint(folder)
        torch.testing.assert_close(found, dict(expected), rtol=0, atol=0)
        torch.testing.assert_close(torch.load(f"{folder}/pytorch_model.bin"), found, rtol=0, atol=0)
        loaded = convert.load_state_dict_from_zero_checkpoint(make_net(), folder)
        torch.testing.assert_close(dict(loaded.state_dict()), found, rtol=0, atol=0)
        convert.convert_zero_checkpoint_to_fp32_state_dict(folder, f"{folder}/out", safe_serialization=True)


@unchanged("a loop of one's own", "`save_checkpoint(client_state=)`, `load_checkpoint`, `zero_to_fp32`")
def test_checkpoints(ranks, tmp_path):
    ranks(saved, 2, str(tmp_path))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_what_is_refused_before_anything_is_made():
    net, config = make_net(), {"train_batch_size": 4}
    with pytest.raises(UsageError, match="mpu is not supported"):
        deepspeed.initialize(model=net, config=config, mpu=object())
    with pytest.raises(UsageError, match="mesh_param is not supported"):
        deepspeed.initialize(model=net, config=config, mesh_param=(1, 1))
    with pytest.raises(UsageError, match="given more than once"):
        deepspeed.initialize(Namespace(deepspeed_config="a.json"), net, config=config)


def test_a_backend_that_accelerate_has_not_found(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match='backend="gloo"'):
        deepspeed.comm.init_distributed(dist_backend=None, auto_mpi_discovery=False)


@unchanged("a loop of one's own", "`RepeatingLoader`")
def test_repeating_loader():
    loader = deepspeed.utils.RepeatingLoader([1, 2])
    assert [next(loader) for _ in range(5)] == [1, 2, 1, 2, 1]


@unchanged("a loop of one's own", "`checkpointing`")
def test_activation_checkpointing():
    x = torch.randn(3, 8, requires_grad=True)
    net = make_net()
    deepspeed.checkpointing.configure(None)
    deepspeed.checkpointing.checkpoint(net, x).sum().backward()
    found, x.grad = x.grad, None
    net(x).sum().backward()
    assert deepspeed.checkpointing.is_configured()
    torch.testing.assert_close(found, x.grad)
