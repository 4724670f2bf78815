"""Transformers' Trainer on a tiny GPT-2: ``trainer.py OUT plain|STAGE [bf16] [file]``; figures as JSON in OUT."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

SAMPLES, LENGTH = 44, 12


def data(seed: int, count: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 32, (count, LENGTH), generator=draw)
    return [{"input_ids": row, "labels": row} for row in ids]


def config() -> GPT2Config:
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 32, "n_positions": LENGTH}
    return GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)


def model(**_: Any) -> GPT2LMHeadModel:
    set_seed(3)
    return GPT2LMHeadModel(config())


AUTO: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "zero_optimization": {
        "stage": 0,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
        "unit_min_numel": 0,
    },
}
OWN = {
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto",
                   "total_num_steps": "auto"},
    },
}  # fmt: skip


def arguments(out: Path, world: int, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out),
        **{
            "per_device_train_batch_size": 4 // world,
            "per_device_eval_batch_size": 4 // world,
            "gradient_accumulation_steps": 2,  # 11 batches: the last window of an epoch holds one
            "max_grad_norm": 0.5,
            "learning_rate": 5e-3,
            "weight_decay": 0.01,
            "warmup_steps": 2,
            "num_train_epochs": 2,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 5,
            "save_strategy": "steps",
            "save_steps": 5,
            "report_to": [],
            "use_cpu": not more.get("deepspeed"),
            "disable_tqdm": True,
            "seed": 5,
            **more,
        },
    )


def figures(trainer: Trainer) -> dict[str, Any]:
    """What was logged, and the whole weights."""
    logs = trainer.state.log_history
    engine = trainer.deepspeed
    state = trainer.model.state_dict() if engine is None else engine.full_state_dict()
    return {
        "losses": [each["loss"] for each in logs if "loss" in each],
        "norms": [float(each["grad_norm"]) for each in logs if "grad_norm" in each],
        "rates": [each["learning_rate"] for each in logs if "learning_rate" in each],
        "eval": [each["eval_loss"] for each in logs if "eval_loss" in each],
        "weights": {name: value.double().norm().item() for name, value in state.items()},
        "steps": trainer.state.global_step,
    }


def run(out: Path, stage: int | None, *, bf16: bool = False, from_file: bool = False, world: int = 1,
        resume: str | None = None, again: str | None = None, pretrained: str | None = None,
        **more: Any) -> dict[str, Any]:  # fmt: skip
    given: dict[str, Any] = {"bf16": bf16}
    if stage is not None:
        from tests.compat.clients.on_cpu import use_transformers

        given |= use_transformers()
        settings = {**AUTO, "zero_optimization": {**AUTO["zero_optimization"], "stage": stage}}
        if from_file:
            file = out.with_suffix(f".{os.environ['RANK']}.json")
            file.write_text(json.dumps({**settings, **OWN}))
            settings = str(file)
        given["deepspeed"] = settings
    made = arguments(out, world, **given, **more)
    chosen = read(pretrained, divided=stage == 3 and world > 1) if pretrained else model()
    trainer = Trainer(chosen, made, train_dataset=data(1, SAMPLES), eval_dataset=data(2, 8))
    trainer.train(resume_from_checkpoint=resume)
    if again == "as it is":
        try:
            trainer.train()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
    elif again == "another Trainer":
        trainer.accelerator.free_memory()
        if stage is not None:
            given |= use_transformers()
        made = arguments(out, world, **given, **more)
        trainer = Trainer(trainer.model, made, train_dataset=data(1, SAMPLES), eval_dataset=data(2, 8))
        trainer.train()
    elif again:
        trainer.model_wrapped = trainer.model
        trainer.train()
    found = figures(trainer)
    trainer.save_model(str(out / "final"))
    if trainer.is_world_process_zero():
        loaded = GPT2LMHeadModel.from_pretrained(out / "final") if stage is None else reread(out / "final")
        found["saved"] = {name: value.double().norm().item() for name, value in loaded.state_dict().items()}
    assert all(math.isfinite(each) for each in found["losses"])
    return found


def read(path: str, *, divided: bool) -> GPT2LMHeadModel:
    """The model at ``path``: at stage 3 never whole on a rank, but for the file that rank 0 maps."""
    from tests.harness import is_whole, most_bytes

    found, most = most_bytes(lambda: GPT2LMHeadModel.from_pretrained(path))
    sizes = [param.nbytes for param in found.parameters()]
    if divided:
        assert not any(is_whole(param) for param in found.parameters())
        assert os.environ["RANK"] == "0" or most <= sum(sizes) / 2 + 1.3 * max(sizes), (most, sizes)
    return found


def reread(path: Path) -> GPT2LMHeadModel:
    from safetensors.torch import load_file

    loaded = GPT2LMHeadModel(config())
    loaded.load_state_dict(load_file(path / "model.safetensors"), strict=False)
    return loaded


def main(out: str, cases: str) -> None:
    """``cases``: a JSON list of keyword arguments of :func:`run`, one after the other in one process."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    found = []
    for number, case in enumerate(json.loads(cases)):
        print("case", case, file=sys.stderr)
        found.append(run(Path(out) / str(number), case.pop("stage"), world=world, **case))
    if os.environ.get("RANK", "0") == "0":
        (Path(out) / "figures.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
