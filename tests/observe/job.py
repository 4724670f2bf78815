"""A training job that is killed and goes on, for tests of what sinks keep: ``job.py CONFIG STEPS [KILL_AFTER]``."""

from __future__ import annotations

import json
import os
import signal
import sys

import torch

import shardline
from shardline.events import Scalars


def main(config: str, steps: int, kill_after: int) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    groups = [{"params": [model[0].weight, model[2].weight]}, {"params": [model[0].bias, model[2].bias], "lr": 0.02}]
    engine, *_ = shardline.initialize(model=model, model_parameters=groups, config=json.loads(config))
    while engine.global_steps < steps:
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(engine.global_steps))
        loss = (engine(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        engine.backward(loss)
        engine.step()
        print(json.dumps([engine.global_steps, loss.item()]), flush=True)
        if engine.global_steps % 2 == 0:
            engine.events.emit(Scalars(engine.global_steps, {"held out": loss.item() / 2}))
        if engine.global_steps == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
    engine.destroy()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
