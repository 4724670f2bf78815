"""TRL's SFT, DPO and GRPO on a tiny GPT-2: ``preferences.py OUT CASES``."""

from __future__ import annotations

import json
import os
import string
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from tests.compat.clients import trainer as plain

WORDS = list(string.ascii_lowercase)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=plain.LENGTH
    )


def text(start: int, count: int) -> str:
    return " ".join(WORDS[(start + each) % 26] for each in range(count))


def vowels(completions: list[str], **_: Any) -> list[float]:
    """The reward of GRPO's completions."""
    return [float(sum(letter in "aeiou" for letter in each)) for each in completions]


def run(out: Path, stage: int | None, world: int, what: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if stage is not None:
        from tests.compat.clients.on_cpu import use_transformers

        given |= use_transformers()
        given["deepspeed"] = {**plain.AUTO, "zero_optimization": {**plain.AUTO["zero_optimization"], "stage": stage}}
    common = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4 // world,
        "num_train_epochs": 1,
        "learning_rate": 5e-3,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": stage is None,
        "disable_tqdm": True,
        "max_length": plain.LENGTH,
        **given,
    }
    if what == "sft":
        rows = [{"text": text(each, 8)} for each in range(16)]
        made = SFTTrainer(plain.model(), SFTConfig(**common), train_dataset=Dataset.from_list(rows),
                          processing_class=tokenizer())  # fmt: skip
    elif what == "grpo":
        rows = [{"prompt": text(each, 4)} for each in range(8)]
        del common["max_length"]
        grpo = GRPOConfig(**common, num_generations=2, max_completion_length=4, temperature=1.0)
        made = GRPOTrainer(plain.model(), reward_funcs=vowels, args=grpo, train_dataset=Dataset.from_list(rows),
                           processing_class=tokenizer())  # fmt: skip
    else:
        rows = [{"prompt": text(each, 4), "chosen": text(each + 4, 3), "rejected": text(each + 9, 3)}
                for each in range(16)]  # fmt: skip
        made = DPOTrainer(plain.model(), plain.model(), DPOConfig(**common), train_dataset=Dataset.from_list(rows),
                          processing_class=tokenizer())  # fmt: skip
    made.train()
    logs = made.state.log_history
    names = {"losses": "loss", "rewards": "reward", "norms": "grad_norm"}
    return {name: [float(each[key]) for each in logs if key in each] for name, key in names.items()}


def main(out: str, cases: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    found = []
    for number, case in enumerate(json.loads(cases)):
        print("case", case, file=sys.stderr)
        found.append(run(Path(out) / str(number), case["stage"], world, case["what"]))
    if os.environ.get("RANK", "0") == "0":
        (Path(out) / "figures.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
