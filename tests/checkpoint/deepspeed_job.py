"""Trains a small model with DeepSpeed and saves it, with what it holds beside it: STAGE DTYPE OUT [all].

``all``: every parameter is trained, none is frozen.

Runs on the Python that has DeepSpeed, which need not be the one that runs the tests.
"""

import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn

# Its own collectives for one host are compiled when they are first used, for minutes on a busy machine; torch's do.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
stage, dtype, out, frozen = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:] != ["all"]
torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(24, 24, bias=False)
        self.register_buffer("count", torch.arange(3.0))
        self.blocks = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))
        self.odd = nn.Parameter(torch.ones(7))
        self.fixed = nn.Linear(24, 24)
        self.fixed.requires_grad_(not frozen)
        self.head = nn.Linear(24, 24, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(self.fixed(x)) * self.odd.sum()


model = Net()
fixed = {f"fixed.{name}": value.clone() for name, value in model.fixed.state_dict().items() if frozen}
config = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
    "zero_optimization": {"stage": stage},
}
if dtype != "fp32":
    config[dtype] = {"enabled": True}
trained = [param for param in model.parameters() if param.requires_grad]
engine = deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]
for _ in range(3):
    x = torch.randn(4, 24, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    engine.backward(engine(x).float().square().mean())
    engine.step()
engine.save_checkpoint(out, client_state={"note": "hello", "best": 0.5})
expected = {}
if stage:
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            expected[f"{name}/weight"] = safe_get_full_fp32_param(param).detach().clone()
            for key in ("exp_avg", "exp_avg_sq"):
                expected[f"{name}/{key}"] = safe_get_full_optimizer_state(param, key).detach().clone()
else:
    expected = {f"{name}/rounded": value for name, value in engine.module.state_dict().items()}
if torch.distributed.get_rank() == 0:
    torch.save({"expected": expected, "fixed": fixed}, f"{out}/expected.pt")
torch.distributed.barrier()
