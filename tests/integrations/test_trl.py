"""TRL's GRPO on an engine: it generates as it trains. SFT and DPO are rows of the table."""

from __future__ import annotations

import pytest

from tests.integrations.clients import common, config, fresh, gpt, needs

pytestmark = needs("transformers", "accelerate", "trl", "datasets")


def grpo(stages, out):
    """Rewards and norms of each stage; None is TRL's own trainer, under DDP."""
    import trl
    from datasets import Dataset

    from shardline.integrations.transformers import ShardlineMixin
    from tests.compat.clients.preferences import text, tokenizer, vowels

    found = []
    for stage in stages:
        fresh()
        arguments = trl.GRPOConfig(
            **common(f"{out}/{stage}", num_train_epochs=1, bf16=False, gradient_checkpointing=False, max_grad_norm=0.5),
            num_generations=2,
            max_completion_length=4,
        )
        kind = trl.GRPOTrainer if stage is None else type("Own", (ShardlineMixin, trl.GRPOTrainer), {})
        trainer = kind(
            gpt(),
            reward_funcs=vowels,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": text(each, 4)} for each in range(8)]),
            processing_class=tokenizer(),
            **({} if stage is None else {"shardline": config(stage)}),
        )
        trainer.train()
        logs = trainer.state.log_history
        found.append([[float(each[key]) for each in logs if key in each] for key in ("reward", "grad_norm")])
        if stage is not None:
            trainer.engine.destroy()
    return found


def test_grpo(ranks, tmp_path) -> None:
    for (rewards, norms), *others in ranks(grpo, 2, (None, 0, 2, 3), str(tmp_path), timeout=300):
        assert any(rewards) and any(norms)
        for found in others:
            assert found[0] == pytest.approx(rewards)
            assert found[1] == pytest.approx(norms, rel=1e-3, abs=1e-5)
