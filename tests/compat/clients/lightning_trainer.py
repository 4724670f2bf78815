"""Lightning's Trainer with a ``DeepSpeedStrategy``: ``lightning_trainer.py OUT CASES``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from tests.compat.clients.accelerate_loop import net, norms
from tests.compat.clients.fabric import batches

EPOCHS = 2


class OnCPU(DeepSpeedStrategy):
    """The strategy demands a GPU before it makes the process group."""

    def setup_environment(self) -> None:
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu")


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.net = net()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val", F.mse_loss(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class AfterTheFirst(L.Callback):
    """Saves after the first epoch, by all ranks."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.out / "first.ckpt")


def run(out: Path, world: int, *, stage: int | None, resume_from: int | None = None, **zero: Any) -> dict[str, Any]:
    """``resume_from`` is the number of the case whose checkpoint after the first epoch is gone on from."""
    resume = None if resume_from is None else str(out.parent / str(resume_from) / "first.ckpt")
    strategy: Any = "auto"
    if stage is not None:
        sections = {"stage": stage, "unit_min_numel": 0, "stage3_param_persistence_threshold": 0, **zero}
        strategy = OnCPU(config={"train_micro_batch_size_per_gpu": 4 // world, "zero_optimization": sections})
        strategy._process_group_backend = "gloo"
    trainer = L.Trainer(
        accelerator="cpu", strategy=strategy, devices=world, max_epochs=EPOCHS, gradient_clip_val=1.0,
        accumulate_grad_batches=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=out, use_distributed_sampler=False, callbacks=[AfterTheFirst(out)],
    )  # fmt: skip
    module = Module()
    own = batches(world, int(os.environ.get("RANK", "0")))
    # Whole windows: at the end of an epoch DeepSpeed keeps an incomplete one.
    trainer.fit(module, DataLoader(own[:4], batch_size=None), DataLoader(own, batch_size=None), ckpt_path=resume)
    losses = torch.tensor(module.losses)
    if world > 1:
        torch.distributed.all_reduce(losses)
    engine = getattr(trainer.strategy, "deepspeed_engine", None)
    weights = module.net.state_dict() if engine is None else {
        name.removeprefix("net.").removeprefix("module.net."): value for name, value in engine.full_state_dict().items()
    }  # fmt: skip
    path = trainer.checkpoint_callback.best_model_path
    found = {"losses": (losses / world).tolist(), "weights": norms(weights), "steps": trainer.global_step, "path": path,
             "val": trainer.callback_metrics["val"].item()}  # fmt: skip
    if engine is not None:
        engine.destroy()
    return found


def main(out: str, cases: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    found = [run(Path(out) / str(n), world, **case) for n, case in enumerate(json.loads(cases))]
    if os.environ.get("RANK", "0") == "0":
        (Path(out) / "figures.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
