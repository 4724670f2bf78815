"""Calls of DeepSpeed that a script makes around its loop, one after the other at stage 3."""

import argparse
import json
import os

import deepspeed
import deepspeed.comm as dist
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    RepeatingLoader,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    set_z3_leaf_modules,
)
from torch import nn


class Mixed(nn.Module):
    """Takes one of two ways, by its input."""

    def __init__(self):
        super().__init__()
        self.ways = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, x):
        return self.ways[int(x.sum() > 0)](x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inlet, self.mixed, self.head = nn.Linear(8, 16), Mixed(), nn.Linear(16, 1)

    def forward(self, x):
        x = deepspeed.checkpointing.checkpoint(lambda x: self.inlet(x).tanh(), x)
        return self.head(self.mixed(x))


def batches(rank):
    x = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(rank))
    return RepeatingLoader([(each, each.sum(1, keepdim=True)) for each in x])


def step(engine, loader):
    x, y = next(loader)
    loss = F.mse_loss(engine(x), y)
    engine.backward(loss)
    return loss.item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--out", required=True)
    parser.add_argument("--save_dir", required=True)
    args = deepspeed.add_config_arguments(parser).parse_args()
    deepspeed.init_distributed()
    rank = dist.get_rank()
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=args.deepspeed_config):
        model = Net()
    with deepspeed.zero.GatheredParameters([model.head.weight], modifier_rank=0):
        if dist.get_rank() == 0:
            nn.init.constant_(model.head.weight, 0.5)
    set_z3_leaf_modules(model, [Mixed])
    engine, optimizer, _, scheduler = deepspeed.initialize(args=args, model=model)
    with deepspeed.zero.GatheredParameters(model.head.weight):
        assert torch.equal(model.head.weight, torch.full((1, 16), 0.5))
    loader, losses = batches(rank), []
    for _ in range(3):
        losses.append(step(engine, loader))
        grad = safe_get_full_grad(model.inlet.weight)
        assert grad.shape == (16, 8)
        safe_set_full_grad(model.inlet.weight, grad.clamp(-1, 1))
        engine.step()
    master = safe_get_full_fp32_param(model.inlet.weight)
    safe_set_full_fp32_param(model.inlet.weight, master * 0.5)
    assert torch.equal(safe_get_full_fp32_param(model.inlet.weight), master * 0.5)
    moment = safe_get_full_optimizer_state(model.inlet.weight, "exp_avg")
    safe_set_full_optimizer_state(model.inlet.weight, torch.zeros_like(moment), "exp_avg")
    assert model.inlet.weight.ds_status is ZeroParamStatus.AVAILABLE
    engine.offload_states()
    engine.reload_states()

    engine.save_checkpoint(args.save_dir, tag="here", client_state={"seen": 3})
    expected = step(engine, loader)
    engine.step()
    if rank == 0:  # any layout loads what was saved, so that a universal checkpoint is a copy of it
        from deepspeed.checkpoint.ds_to_universal import main as convert

        convert(argparse.Namespace(input_folder=f"{args.save_dir}/here", output_folder=f"{args.save_dir}/universal"))
    dist.barrier()
    path, client_state = engine.load_checkpoint(args.save_dir, tag="universal")
    assert os.path.basename(path.rstrip("/")) == "universal", path
    loader = batches(rank)
    for _ in range(client_state["seen"]):
        next(loader)
    assert abs(step(engine, loader) - expected) < 1e-6
    engine.step()
    assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
    if rank == 0:
        from deepspeed.utils.zero_to_fp32 import load_state_dict_from_zero_checkpoint

        loaded = load_state_dict_from_zero_checkpoint(Net(), args.save_dir, tag="here")
        assert torch.equal(loaded.inlet.weight, master * 0.5)
        with open(args.out, "w") as file:
            json.dump({"losses": losses}, file)


if __name__ == "__main__":
    main()
