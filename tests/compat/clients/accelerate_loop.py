"""A loop on Accelerate's DeepSpeedPlugin: ``accelerate_loop.py OUT CASES``; a case with stage null is plain torch."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ACCUMULATION, EPOCHS = 2, 3


def net() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def dataset() -> TensorDataset:
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x.sum(1, keepdim=True))


def norms(state: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.double().norm().item() for name, value in state.items()}


def plain() -> dict[str, Any]:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    losses, seen = [], []
    for _ in range(EPOCHS):
        batches = list(DataLoader(dataset(), batch_size=4))  # 5 of them: the last window of an epoch holds one
        for number, (x, y) in enumerate(batches):
            loss = F.mse_loss(model(x), y)
            losses.append(loss.item())
            (loss / ACCUMULATION).backward()
            if (number + 1) % ACCUMULATION == 0 or number + 1 == len(batches):
                seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
    return {"losses": losses, "norms": seen, "weights": norms(model.state_dict())}


def sharded(out: Path, stage: int, resume_at: int | None = None) -> dict[str, Any]:
    from accelerate import Accelerator, DeepSpeedPlugin

    from tests.compat.clients.on_cpu import use_accelerate

    use_accelerate()
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage, "unit_min_numel": 0, "stage3_param_persistence_threshold": 0},
    }
    plugin = DeepSpeedPlugin(hf_ds_config=config, gradient_accumulation_steps=ACCUMULATION)
    accelerator = Accelerator(
        deepspeed_plugin=plugin, gradient_accumulation_steps=ACCUMULATION, step_scheduler_with_optimizer=False
    )
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    loader = DataLoader(dataset(), batch_size=4 // accelerator.num_processes)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    losses, seen = [], []
    for epoch in range(EPOCHS):
        if epoch == resume_at:
            accelerator.save_state(str(out))
            x, y = next(iter(loader))
            accelerator.backward(F.mse_loss(model(x), y))  # a step that the load takes back
            accelerator.load_state(str(out))
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.mse_loss(model(x), y)
                accelerator.backward(loss)
                losses.append(accelerator.reduce(loss.detach(), "mean").item())
                if accelerator.sync_gradients:
                    seen.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
                optimizer.step()
                if accelerator.sync_gradients:
                    scheduler.step()
                optimizer.zero_grad()
    unwrapped = accelerator.unwrap_model(model)
    assert type(unwrapped) is nn.Sequential
    state = accelerator.get_state_dict(model)
    found = {"losses": losses, "norms": seen, "weights": {} if state is None else norms(state)}
    accelerator.free_memory()
    return found


def main(out: str, cases: str) -> None:
    found = []
    for number, case in enumerate(json.loads(cases)):
        stage = case.pop("stage")
        found.append(plain() if stage is None else sharded(Path(out) / str(number), stage, **case))
    if os.environ.get("RANK", "0") == "0":
        (Path(out) / "figures.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
