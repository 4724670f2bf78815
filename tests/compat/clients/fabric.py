"""Lightning Fabric with strategy ``deepspeed_stage_2`` and ``_3``: ``fabric.py OUT CASES``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tests.compat.clients.accelerate_loop import dataset, net, norms

EPOCHS = 2


def batches(world: int, rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = dataset().tensors
    return [(a[rank::world], b[rank::world]) for a, b in zip(x.split(4), y.split(4), strict=True)]


def plain() -> dict[str, Any]:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(EPOCHS):
        for x, y in batches(1, 0):
            loss = F.mse_loss(model(x), y)
            losses.append(loss.item())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # DeepSpeed's default
            optimizer.step()
            optimizer.zero_grad()
    return {"losses": losses, "weights": norms(model.state_dict())}


def sharded(out: Path, stage: int) -> dict[str, Any]:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DeepSpeedStrategy

    class OnCPU(DeepSpeedStrategy):
        """The strategy demands a GPU before it makes the process group."""

        def setup_environment(self) -> None:
            self.accelerator.setup_device(self.root_device)
            self._set_world_ranks()
            self._init_deepspeed_distributed()
            self._format_config()
            self._config_initialized = True

        @property
        def root_device(self) -> torch.device:
            return torch.device("cpu")

    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    zero = {"stage": stage, "unit_min_numel": 0, "stage3_param_persistence_threshold": 0}
    strategy = OnCPU(config={"train_micro_batch_size_per_gpu": 4 // world, "zero_optimization": zero})
    strategy._process_group_backend = "gloo"
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=world, precision="32-true")
    fabric.launch()
    with fabric.init_module():
        model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = fabric.setup(model, optimizer)
    losses = []
    for epoch in range(EPOCHS):
        if epoch == 1:
            fabric.save(out, {"model": model, "optimizer": optimizer, "epoch": epoch})
            rest = fabric.load(out, {"model": model, "optimizer": optimizer})
            assert rest["epoch"] == 1, rest
        for x, y in batches(world, rank):
            loss = F.mse_loss(model(x), y)
            losses.append(fabric.all_reduce(loss.detach(), reduce_op="mean").item())
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    engine = strategy._deepspeed_engine
    return {"losses": losses, "weights": norms(engine.full_state_dict())}


def main(out: str, cases: str) -> None:
    found = []
    for number, case in enumerate(json.loads(cases)):
        stage = case["stage"]
        found.append(plain() if stage is None else sharded(Path(out) / str(number), stage))
    if os.environ.get("RANK", "0") == "0":
        (Path(out) / "figures.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
