"""Lightning's Fabric and Trainer over engines: their figures are those of Lightning itself in one process."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.engine.cases import attempt, is_sentence
from tests.integrations.clients import (
    STAGES,
    assert_alike,
    config,
    means,
    needs,
    net,
    norms,
    rows_of_rank,
    under_torchrun,
    world,
)

pytestmark = needs("lightning")


# -- Fabric -----------------------------------------------------------------------------------------------------------


def fabric(stage, *, strategy=None, folder=None, load=False, **options):
    from lightning.fabric import Fabric

    import shardline.integrations.lightning as ours

    under_torchrun()
    if stage is not None and strategy is None:
        strategy = ours.ShardlineFabricStrategy(config(stage))
    fabric = Fabric(accelerator="cpu", devices=world(), strategy=strategy or "auto", **options)
    fabric.launch()
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model, optimizer = fabric.setup(model, optimizer)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "epoch": 0}
    if load:
        fabric.load(folder, state)
    found = {"losses": [], "norms": []}
    for epoch in range(state["epoch"], 3):
        if epoch == 1 and folder is not None and not load:
            fabric.save(folder, state | {"epoch": epoch})
        rows = rows_of_rank()
        for number, (x, y) in enumerate(rows):
            last = number % 2 == 1 or number + 1 == len(rows)
            with fabric.no_backward_sync(model, enabled=not last and stage is not None):
                loss = F.mse_loss(model(x), y)
                fabric.backward(loss / 2)
            found["losses"].append(float(fabric.all_reduce(loss.detach(), reduce_op="mean")))
            if last:
                found["norms"].append(float(fabric.clip_gradients(model, optimizer, max_norm=0.5)))
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
    engines = getattr(fabric.strategy, "engines", [])
    found["weights"] = norms(engines[0].full_state_dict() if engines else model.state_dict())
    for engine in engines:
        engine.destroy()
    return found


def fabrics(stages, **options):
    return [fabric(stage, **options) for stage in stages]


def test_fabric(ranks, tmp_path) -> None:
    wanted = ranks(fabric, 1, None)[0]
    for count in (1, 2):
        for found in ranks(fabrics, count, STAGES):
            for figures in found:
                assert_alike(figures, wanted)
    for figures in ranks(fabric, 2, 3, strategy="shardline_stage_3"):
        assert_alike(figures, wanted)
    path = str(tmp_path / "state")
    ranks(fabric, 2, 3, folder=path)
    assert torch.load(path, weights_only=True)["optimizer"]["state"][0]["exp_avg"].shape == (16, 8)  # a plain file
    for count, stage in ((1, None), (1, 2), (2, 3)):
        for figures in ranks(fabric, count, stage, folder=path, load=True):
            assert figures["losses"] == pytest.approx(wanted["losses"][5:], rel=1e-5)
            assert figures["weights"] == pytest.approx(wanted["weights"], rel=1e-5)


def loader(rows):
    return torch.utils.data.DataLoader(rows, batch_size=None)


# -- the Trainer ------------------------------------------------------------------------------------------------------


def lit(**attributes):
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.seen, self.checks = net(), [], []

        def training_step(self, batch, index):
            loss = F.mse_loss(self.net(batch[0]), batch[1])
            self.seen.append(loss.detach())
            return loss

        def validation_step(self, batch, index):
            self.checks.append(F.mse_loss(self.net(batch[0]), batch[1]))

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return type("Module", (Module,), attributes)()


def fit(stage, *, strategy=None, resume=None, module=lit, **options):
    from lightning.pytorch import Trainer

    import shardline.integrations.lightning as ours

    under_torchrun()
    if stage is not None and strategy is None:
        strategy = ours.ShardlineStrategy(config(stage))
    trainer = Trainer(
        **{
            "accelerator": "cpu", "devices": world(), "strategy": strategy or "auto", "max_epochs": 3, "logger": False,
            "accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 1,
            "use_distributed_sampler": False,
            **options,
        }
    )  # fmt: skip
    model = module()
    rows = rows_of_rank()
    trainer.fit(model, loader(rows), loader(rows[:1]), ckpt_path=resume)
    found = {name: [means(value) for value in getattr(model, name)] for name in ("seen", "checks")}
    assert not getattr(trainer.strategy, "engines", [])
    return found | {"weights": norms(model.state_dict())}


def fits(stages, **options):
    return [fit(stage, **options) for stage in stages]


def saving(path):
    """Saves after the first epoch, by all ranks."""
    from lightning.pytorch import Callback

    class Saving(Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(path)

    return Saving()


def fit_and_save(stage, path):
    return fit(stage, callbacks=[saving(path)])


def test_the_trainer(ranks, tmp_path) -> None:
    wanted = ranks(fit, 1, None)[0]
    assert len(wanted["seen"]) == 15 and len(wanted["checks"]) == 4
    for count in (1, 2):
        for found in ranks(fits, count, STAGES):
            for figures in found:
                assert_alike(figures, wanted)
    for figures in ranks(fit, 2, 3, strategy="shardline_stage_3"):
        assert_alike(figures, wanted)
    path = str(tmp_path / "state.ckpt")
    for figures in ranks(fit_and_save, 2, 3, path):
        assert_alike(figures, wanted)
    for count, stage in ((1, None), (1, 2), (2, 3)):
        for figures in ranks(fit, count, stage, resume=path):
            assert figures["seen"] == pytest.approx(wanted["seen"][5:], rel=1e-5)
            assert figures["weights"] == pytest.approx(wanted["weights"], rel=1e-5)


def test_mixed_precision(ranks) -> None:
    wanted = ranks(fit, 1, None)[0]["seen"]
    for stage in (0, 3):
        for figures in ranks(fit, 2, stage, precision="bf16-mixed"):
            assert figures["seen"] == pytest.approx(wanted, rel=5e-2, abs=2e-2)


def two_parts():
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.generator, self.critic, self.seen, self.checks = net(), nn.Linear(1, 1), [], []

        def training_step(self, batch, index):
            first, second = self.optimizers()
            loss = self.critic(self.generator(batch[0])).square().mean()
            self.manual_backward(loss)
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()
            self.seen.append(loss.detach())

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.generator, self.critic)]

    return Module()


def sharing():
    module = two_parts()
    module.configure_optimizers = lambda: [
        torch.optim.SGD(part.parameters(), lr=0.1) for part in (module.generator, module.generator[0])
    ]
    return module


def refused(stage, **options):
    return attempt(fit, stage, **options | {"module": sharing})


def test_several_optimizers(ranks, tmp_path) -> None:
    options = {"module": two_parts, "accumulate_grad_batches": 1, "gradient_clip_val": None}
    wanted = ranks(fit, 1, None, **options)[0]
    for stage in (0, 3):
        for figures in ranks(fit, 2, stage, **options):
            assert_alike(figures, wanted)
        for said in ranks(refused, 2, stage, **options):
            assert is_sentence(said, "UsageError", "share a module")


def failing():
    def training_step(self, batch, index):
        raise ZeroDivisionError("in the step")

    return lit(training_step=training_step)


def failed(stage):
    return attempt(fit, stage, module=failing)


def test_an_error_stays_what_it_was(ranks) -> None:
    for stage in (0, 3):
        assert ranks(failed, 2, stage) == [("ZeroDivisionError", "in the step")] * 2
