"""PEFT's LoRA under Transformers' Trainer and under TRL's SFT and DPO: ``lora.py OUT CASES``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer

from tests.compat.clients import trainer as plain


def run(out: Path, stage: int | None, world: int, bf16: bool = False) -> dict[str, Any]:
    given: dict[str, Any] = {"bf16": bf16, "load_best_model_at_end": False}
    if stage is not None:
        from tests.compat.clients.on_cpu import use_transformers

        given |= use_transformers()
        given["deepspeed"] = {**plain.AUTO, "zero_optimization": {**plain.AUTO["zero_optimization"], "stage": stage}}
    made = plain.arguments(out, world, **given)
    base = plain.model()
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(base, lora)
    trainer = Trainer(model, made, train_dataset=plain.data(1, plain.SAMPLES), eval_dataset=plain.data(2, 8))
    trainer.train()
    found = plain.figures(trainer)
    trainer.save_model(str(out / "final"))
    if trainer.is_world_process_zero():
        adapter = PeftModel.from_pretrained(plain.model(), out / "final").state_dict()
        found["saved"] = {
            name: value.double().norm().item() for name, value in adapter.items() if ".lora_" in name
        }  # fmt: skip
    return found


def main(out: str, cases: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    found = []
    for number, case in enumerate(json.loads(cases)):
        print("case", case, file=sys.stderr)
        found.append(run(Path(out) / str(number), case.pop("stage"), world, **case))
    if os.environ.get("RANK", "0") == "0":
        (Path(out) / "figures.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
