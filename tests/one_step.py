"""What an installed Shardline must be able to do, without the repository: train one step, on one process or many."""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import version
from importlib.resources import files

sys.modules["numpy"] = None  # type: ignore[assignment]  # no dependency: an empty environment has none
warnings.filterwarnings("ignore", "Failed to initialize NumPy")

import torch  # noqa: E402

import shardline  # noqa: E402

config = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
}
torch.manual_seed(0)
data = torch.utils.data.TensorDataset(torch.ones(8, 4))
engine, _, loader, _ = shardline.initialize(model=torch.nn.Linear(4, 1), training_data=data, config=config)
before = engine.full_state_dict()
for (inputs,) in loader:
    engine.backward(engine(inputs.to(engine.device)).square().mean())
    engine.step()
after = engine.full_state_dict()
engine.destroy()
assert engine.global_steps == 1 and not torch.equal(before["weight"], after["weight"])
assert files("shardline").joinpath("py.typed").is_file()
assert version("shardline") == shardline.__version__
print(shardline.__version__, shardline.__file__)
