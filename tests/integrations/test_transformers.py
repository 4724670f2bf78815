"""Transformers' Trainer on an engine: its figures are those of the plain Trainer in one process."""

from __future__ import annotations

import pytest

from tests.integrations.clients import (
    SAMPLES,
    STAGES,
    assert_alike,
    common,
    config,
    fresh,
    gpt,
    logged,
    lora,
    needs,
    norms,
    texts,
)

pytestmark = needs("transformers", "accelerate")
EVALUATED = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}


def train(out, stage, resume=None, *, model=gpt, again=False, shardline=None, **arguments):
    """Train, save, read what was saved; ``stage`` None is the plain Trainer."""
    import transformers

    fresh()
    made = transformers.TrainingArguments(**common(out, **EVALUATED | arguments))
    data = {"train_dataset": texts(1, SAMPLES), "eval_dataset": texts(2, 8)}
    if stage is None:
        trainer = transformers.Trainer(model(), made, **data)
    else:
        from shardline.integrations.transformers import Trainer

        trainer = Trainer(model(), made, **data, shardline=config(stage, **(shardline or {})))
    trainer.train(resume_from_checkpoint=resume)
    if again:
        trainer.train()
    found = logged(trainer)
    found["last eval"] = trainer.evaluate()["eval_loss"]
    trainer.save_model(f"{out}/final")
    trainer.accelerator.wait_for_everyone()
    if hasattr(trainer.model, "peft_config"):
        from peft import PeftModel

        saved = PeftModel.from_pretrained(gpt(), f"{out}/final").state_dict()
        found["saved"] = {name: value for name, value in norms(saved).items() if ".lora_" in name}
    else:
        found["saved"] = norms(type(trainer.model).from_pretrained(f"{out}/final").state_dict())
    if (engine := getattr(trainer, "engine", None)) is not None:
        engine.destroy()
    return found


def each(out, stages, resume=None, **options):
    return [train(f"{out}/{stage}", stage, resume, **options) for stage in stages]


@pytest.fixture(scope="module")
def plain(ranks, tmp_path_factory):
    """One process, no engine: what the others are compared with."""
    return ranks(train, 1, str(tmp_path_factory.mktemp("plain")), None, timeout=200)[0]


def test_its_figures_are_the_plain_ones(ranks, plain, tmp_path) -> None:
    assert len(plain["losses"]) == plain["steps"] == 12 and plain["losses"][-1] < plain["losses"][0]
    for found in ranks(each, 2, str(tmp_path / "two"), STAGES, timeout=300):
        for figures in found:
            assert_alike(figures, plain)
    for figures in ranks(each, 1, str(tmp_path / "one"), (2, 3), timeout=200)[0]:
        assert_alike(figures, plain)


def test_it_resumes_at_another_stage_and_number_of_ranks(ranks, plain, tmp_path) -> None:
    ranks(train, 2, str(tmp_path / "a"), 3, timeout=200)
    begun = str(tmp_path / "a" / "checkpoint-5")
    wanted = {name: value for name, value in plain.items() if name not in ("losses", "norms", "rates", "eval")}
    for world, stage in ((1, 2), (2, 1), (2, 3)):
        for found in ranks(train, world, str(tmp_path / f"{world}{stage}"), stage, begun, timeout=200):
            assert found["losses"] == pytest.approx(plain["losses"], rel=1e-5)
            assert_alike({name: found[name] for name in wanted}, wanted)


def test_it_goes_on_from_a_checkpoint_of_the_plain_trainer(ranks, plain, tmp_path) -> None:
    ranks(train, 1, str(tmp_path / "a"), None, timeout=200)
    for stage in (2, 3):
        for found in ranks(train, 2, str(tmp_path / str(stage)), stage, str(tmp_path / "a" / "checkpoint-5")):
            assert_alike(found, plain)


def test_the_best_model_comes_back_and_a_second_train_goes_on(ranks, tmp_path) -> None:
    options = {"load_best_model_at_end": True, "learning_rate": 2e-2, "again": True}
    wanted = ranks(train, 1, str(tmp_path / "plain"), None, **options, timeout=200)[0]
    for stage in (1, 3):
        for found in ranks(train, 2, str(tmp_path / str(stage)), stage, **options, timeout=200):
            assert_alike(found, wanted, 1e-3)  # the rounding of 24 steps at a high rate


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        {"max_grad_norm": 0.0},
    ],
    ids=["checkpointing", "reentrant", "compiled", "unclipped"],
)
def test_options_of_the_trainer(ranks, tmp_path, options) -> None:
    wanted = ranks(train, 1, str(tmp_path / "plain"), None, **options, timeout=200)[0]
    for found in ranks(each, 2, str(tmp_path), (1, 3), **options, timeout=300):
        for figures in found:
            assert_alike(figures, wanted, 2e-5)


def test_lora(ranks, tmp_path) -> None:
    wanted = ranks(train, 1, str(tmp_path / "plain"), None, model=with_lora, timeout=200)[0]
    for found in ranks(each, 2, str(tmp_path), STAGES, model=with_lora, timeout=300):
        for figures in found:
            assert figures["saved"]
            assert_alike(figures, wanted)


def with_lora():
    return lora(gpt())


def test_lower_precision(ranks, plain, tmp_path) -> None:
    for options in ({"bf16": True}, {"shardline": {"bf16": {"enabled": True}}}):
        for found in ranks(each, 2, str(tmp_path), (0, 3), **options, timeout=300):
            for figures in found:
                assert figures["losses"] == pytest.approx(plain["losses"], rel=3e-2)
                assert figures["last eval"] == pytest.approx(plain["last eval"], rel=3e-2)


# -- a trainer that predicts by generating ----------------------------------------------------------------------------


ENDS = list(range(1, 9))


def translating(stages, out):
    """Losses, metrics of what was generated, predictions, of each stage; None is the plain trainer, under DDP."""
    import torch
    import transformers

    from shardline.integrations.transformers import ShardlineMixin

    found = []
    for stage in stages:
        fresh()
        torch.manual_seed(3)
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)
        )
        for param in model.parameters():
            torch.nn.init.normal_(param, std=0.4)  # so that what is said depends on what is read
        model.generation_config.eos_token_id = ENDS  # ranks end at different lengths
        arguments = transformers.Seq2SeqTrainingArguments(
            **common(f"{out}/{stage}", num_train_epochs=1, eval_strategy="steps", eval_steps=2),
            predict_with_generate=True,
            generation_max_length=8,
        )

        def metrics(prediction):
            return {"mean": float(prediction.predictions.clip(0).mean())}

        kind = transformers.Seq2SeqTrainer
        own = {} if stage is None else {"shardline": config(stage)}
        trainer = (kind if stage is None else type("Own", (ShardlineMixin, kind), {}))(
            model, arguments, train_dataset=texts(1, 24), eval_dataset=texts(2, 8), compute_metrics=metrics, **own
        )
        trainer.train()
        predicted = trainer.predict(texts(3, 6)).predictions
        logs = trainer.state.log_history
        figures = [[each[key] for each in logs if key in each] for key in ("loss", "eval_loss", "eval_mean")]
        found.append((figures, predicted.tolist()))
        if stage is not None:
            trainer.engine.destroy()
    return found


def test_a_trainer_that_generates(ranks, tmp_path) -> None:
    for plain, *others in ranks(translating, 2, (None, 0, 2, 3), str(tmp_path), timeout=300):
        (losses, checks, means), predicted = plain
        assert len(checks) == len(means) == 2
        assert len({sum(token != 0 for token in row) for row in predicted}) > 1
        for figures, said in others:
            assert figures[0] == pytest.approx(losses, rel=1e-5)
            assert figures[1] == pytest.approx(checks, rel=1e-5)
            assert figures[2] == pytest.approx(means)
            assert said == predicted
