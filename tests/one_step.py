"""What an installed Shardline must be able to do, without the repository: train one step."""

from __future__ import annotations

from importlib.metadata import version
from importlib.resources import files

import torch

import shardline

config = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
}
torch.manual_seed(0)
engine, *_ = shardline.initialize(model=torch.nn.Linear(4, 1), config=config)
before = engine.full_state_dict()
engine.backward(engine(torch.ones(8, 4, device=engine.device)).square().mean())
engine.step()
after = engine.full_state_dict()
engine.destroy()
assert engine.global_steps == 1 and not torch.equal(before["weight"], after["weight"])
assert files("shardline").joinpath("py.typed").is_file()
assert version("shardline") == shardline.__version__
print(shardline.__version__, shardline.__file__)
