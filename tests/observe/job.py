"""A training job that ends in one way or another, for tests of what sinks keep: ``job.py JSON``.

Keys: ``config``; ``steps`` of the whole job; ``end``, how the process of ``rank`` ends after step ``at``; ``late``, if
verdicts are read late. It prints the step and the loss of each step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import pytest
import torch

import shardline
from shardline.events import Scalars
from tests.conftest import late_verdict


def fail() -> None:
    raise ValueError("the batch is bad")


ENDS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "crash": lambda: os._exit(7),
    "error": fail,
    "exit": lambda: sys.exit(0),
}


def main(config: dict[str, Any], steps: int, end: str = "", at: int = 0, rank: int = 0, late: bool = False) -> None:
    if late:
        late_verdict(pytest.MonkeyPatch())
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    groups = [{"params": [model[0].weight, model[2].weight]}, {"params": [model[0].bias, model[2].bias], "lr": 0.02}]
    engine, *_ = shardline.initialize(model=model, model_parameters=groups, config=config)
    while engine.global_steps < steps:
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(engine.global_steps))
        loss = (engine(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        engine.backward(loss)
        engine.step()
        if engine.global_rank == 0:
            print(json.dumps([engine.global_steps, loss.item()]), flush=True)
        if engine.global_steps % 2 == 0:
            engine.events.emit(Scalars(engine.global_steps, {"held out": loss.item() / 2}))
        if engine.global_steps == at and engine.global_rank == rank:
            ENDS[end]()
    engine.destroy()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
