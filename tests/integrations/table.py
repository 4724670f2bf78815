"""The table of docs/integrations.md: what trains in which client at which stage, found by training it on two ranks.

.venv-integrations/bin/python -m tests.integrations.table     # writes it
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.integrations.clients import (
    STAGES,
    common,
    config,
    dataset,
    fresh,
    gpt,
    lora,
    means,
    rows_of_rank,
    under_torchrun,
    world,
)

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
FEATURES = ("fp32", "bf16 autocast", "compiled", "LoRA", "QLoRA")
TOLERANCE = {"bf16 autocast": 5e-2}


class QuantizedLinear(nn.Module):
    """A frozen base in uint8 with one scale, and a low-rank part that is trained, as QLoRA has it."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        weight = plain.weight.detach()
        self.scale = float(weight.abs().max()) / 127
        stored = (weight / self.scale + 128).round().to(torch.uint8)
        self.weight, self.bias = nn.Parameter(stored, requires_grad=False), plain.bias
        self.a, self.b = (
            nn.Parameter(torch.randn(2, weight.shape[1]) / 4),
            nn.Parameter(torch.zeros(weight.shape[0], 2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight.to(x.dtype) - 128) * self.scale
        return F.linear(x, weight, self.bias) + F.linear(F.linear(x, self.a), self.b)


class Net(nn.Module):
    """A regression that takes a batch as the Trainer gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return {"loss": F.mse_loss(out.float(), labels)}


def quantized(model: nn.Module) -> nn.Module:
    """Its projections in uint8 with trained low-rank parts, all else frozen."""
    torch.manual_seed(6)
    model.requires_grad_(False)
    for block in model.transformer.h:  # type: ignore[union-attr, attr-defined]
        plain = nn.Linear(*block.mlp.c_fc.weight.shape)
        plain.weight.data, plain.bias.data = block.mlp.c_fc.weight.t().contiguous(), block.mlp.c_fc.bias.detach()
        block.mlp.c_fc = QuantizedLinear(plain.requires_grad_(False))
    return model


def build(feature: str) -> nn.Module:
    torch.manual_seed(7)
    model = Net()
    if feature == "LoRA":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["first", "second"]))
    if feature == "QLoRA":
        model.first, model.second = QuantizedLinear(model.first), QuantizedLinear(model.second)
    return model


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)


def strategy_options(feature: str) -> dict[str, Any]:
    return {"compile": {"backend": "aot_eager"}} if feature == "compiled" else {}


# -- a training in each client: the losses of its steps, means over the ranks ------------------------------------------


def in_transformers(feature: str, stage: int | None) -> list[float]:
    import transformers

    from shardline.integrations.transformers import Trainer

    fresh()
    more = {
        "bf16 autocast": {"bf16": True},
        "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    }.get(feature if stage is not None or feature == "bf16 autocast" else "", {})
    data = [{"x": x, "labels": y} for x, y in zip(*dataset().tensors, strict=True)]
    made = transformers.TrainingArguments(**common(tempfile.mkdtemp(), num_train_epochs=1, **more))
    if stage is None:
        trainer = transformers.Trainer(build(feature), made, train_dataset=data)
    else:
        trainer = Trainer(build(feature), made, train_dataset=data, shardline=config(stage))
    trainer.train()
    return finish(trainer)


def finish(trainer: Any) -> list[float]:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if (engine := getattr(trainer, "engine", None)) is not None:
        engine.destroy()
    return losses


def in_accelerate(feature: str, stage: int | None) -> list[float]:
    import accelerate

    from shardline.integrations.accelerate import Accelerator

    fresh()
    options = {"cpu": True, "mixed_precision": "bf16" if feature == "bf16 autocast" else "no"}
    if stage is None:
        accelerator = accelerate.Accelerator(**options)
    else:
        backend = "aot_eager" if feature == "compiled" else "no"
        accelerator = Accelerator(**options, dynamo_backend=backend, shardline=config(stage))
    model = build(feature)
    model, optimizer = accelerator.prepare(model, adam(model))
    losses = []
    for x, y in rows_of_rank():
        loss = model(x=x, labels=y)["loss"]
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(means(loss))
    accelerator.free_memory(model)
    return losses


def in_fabric(feature: str, stage: int | None) -> list[float]:
    from lightning.fabric import Fabric

    from shardline.integrations.lightning import ShardlineFabricStrategy

    under_torchrun()
    strategy = "auto" if stage is None else ShardlineFabricStrategy(config(stage), **strategy_options(feature))
    precision = "bf16-mixed" if feature == "bf16 autocast" else "32-true"
    fabric = Fabric(accelerator="cpu", devices=world(), strategy=strategy, precision=precision)
    fabric.launch()
    model = build(feature)
    model, optimizer = fabric.setup(model, adam(model))
    losses = []
    for x, y in rows_of_rank():
        loss = model(x=x, labels=y)["loss"]
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(means(loss))
    for engine in getattr(fabric.strategy, "engines", []):
        engine.destroy()
    return losses


def in_lightning(feature: str, stage: int | None) -> list[float]:
    from lightning.pytorch import LightningModule, Trainer

    from shardline.integrations.lightning import ShardlineStrategy

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = build(feature)
            self.seen: list[Tensor] = []

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss: Tensor = self.net(x=batch[0], labels=batch[1])["loss"]
            self.seen.append(loss.detach())
            return loss

        def configure_optimizers(self) -> Any:
            return adam(self)

    under_torchrun()
    strategy = "auto" if stage is None else ShardlineStrategy(config(stage), **strategy_options(feature))
    trainer = Trainer(
        accelerator="cpu", devices=world(), strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False,
        precision="bf16-mixed" if feature == "bf16 autocast" else "32-true", enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(rows_of_rank(), batch_size=None))
    return [means(loss) for loss in module.seen]


def tokenizer() -> Any:
    from tests.compat.clients.preferences import tokenizer

    return tokenizer()


def in_trl(feature: str, stage: int | None, *, preferences: bool = False) -> list[float]:
    import trl
    from datasets import Dataset

    from shardline.integrations.transformers import ShardlineMixin
    from tests.compat.clients.preferences import text

    fresh()
    kind = trl.DPOTrainer if preferences else trl.SFTTrainer
    compiled = (
        {"torch_compile": True, "torch_compile_backend": "aot_eager"}
        if feature == "compiled" and stage is not None
        else {}
    )
    settings = common(
        tempfile.mkdtemp(), num_train_epochs=1, max_length=12, bf16=feature == "bf16 autocast",
        gradient_checkpointing=False, **compiled,
    )  # fmt: skip
    rows = [
        {"prompt": text(each, 4), "chosen": text(each + 4, 3), "rejected": text(each + 9, 3)}
        if preferences
        else {"text": text(each, 8)}
        for each in range(16)
    ]
    made = (trl.DPOConfig if preferences else trl.SFTConfig)(**settings)
    model = {"LoRA": lora, "QLoRA": quantized}.get(feature, lambda plain: plain)(gpt())
    options: dict[str, Any] = {} if stage is None else {"shardline": config(stage)}
    if preferences and feature != "LoRA":
        options["ref_model"] = gpt()
    own = kind if stage is None else type("Own", (ShardlineMixin, kind), {})
    trainer = own(
        model=model, args=made, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(), **options
    )
    trainer.train()
    return finish(trainer)


def in_sft(feature: str, stage: int | None) -> list[float]:
    return in_trl(feature, stage)


def in_dpo(feature: str, stage: int | None) -> list[float]:
    return in_trl(feature, stage, preferences=True)


CLIENTS: dict[str, tuple[Callable[[str, int | None], list[float]], tuple[str, ...]]] = {
    "Transformers: `Trainer`": (in_transformers, FEATURES),
    "Accelerate: `Accelerator`": (in_accelerate, FEATURES),
    "Lightning: `Fabric`": (in_fabric, FEATURES),
    "Lightning: `Trainer`": (in_lightning, FEATURES),
    "TRL: `SFTTrainer`": (in_sft, FEATURES),
    "TRL: `DPOTrainer`": (in_dpo, FEATURES),
}
"""By client: a training, and what of it is tried."""


# -- the table ---------------------------------------------------------------------------------------------------------


def train(client: str, stages: tuple[int | None, ...]) -> dict[str, dict[int | None, list[float] | str]]:
    """On a rank: each training; its losses, or what it raised."""
    run, features = CLIENTS[client]
    found: dict[str, dict[int | None, list[float] | str]] = {}
    for feature in features:
        for stage in stages:
            try:
                found.setdefault(feature, {})[stage] = run(feature, stage)
            except Exception as error:
                found.setdefault(feature, {})[stage] = f"{type(error).__name__}: {error}"
    return found


def works(losses: Any, wanted: Any, feature: str) -> bool:
    allowed = TOLERANCE.get(feature, 1e-5)
    return (
        isinstance(losses, list)
        and len(losses) == len(wanted)
        and all(abs(a - b) <= allowed * max(1.0, abs(b)) for a, b in zip(losses, wanted, strict=True))
    )


def row(ranks: Any, client: str, complain: Callable[[str], None] = lambda text: None) -> str:
    """The row of ``client``, from a training of everything in it."""
    plain = ranks(train, 1, client, (None,), timeout=200)[0]
    everyone = ranks(train, 2, client, STAGES, timeout=300)
    cells = []
    for feature in FEATURES:
        if feature not in plain:
            cells.append("not tried")
            continue
        wanted = plain[feature][None]
        good = [s for s in STAGES if all(works(each[feature][s], wanted, feature) for each in everyone)]
        for stage in set(STAGES) - set(good):
            complain(f"{client}, {feature}, stage {stage}: {everyone[0][feature][stage]}, and not {wanted}")
        cells.append("stages " + ", ".join(map(str, good)) if good else "no")
    return f"| {client} | {' | '.join(cells)} |\n"


def head() -> str:
    return f"| | {' | '.join(FEATURES)} |\n|---|{'---|' * len(FEATURES)}\n"


def written() -> str:
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    from tests.conftest import Ranks

    ranks = Ranks()
    table = head() + "".join(row(ranks, client, print) for client in CLIENTS)
    ranks.close()
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(before + BEGIN + table + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
