"""A loop on Accelerate over an engine: its figures are those of a plain loop in one process."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardline
from tests.engine.cases import attempt, is_sentence
from tests.integrations.clients import STAGES, assert_alike, config, dataset, fresh, gpt, lora, needs, net, norms, world

pytestmark = needs("transformers", "accelerate", "peft")
WINDOW, EPOCHS = 2, 3


def plain(*, build=net, loss_of=F.mse_loss, lr=1e-2):
    """5 batches an epoch: the last window holds one."""
    model = build()
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    found = {"losses": [], "norms": []}
    for _ in range(EPOCHS):
        batches = list(torch.utils.data.DataLoader(dataset(), batch_size=4))
        for number, (x, y) in enumerate(batches):
            loss = loss_of(model(x), y)
            found["losses"].append(loss.item())
            (loss / WINDOW).backward()
            if (number + 1) % WINDOW == 0 or number + 1 == len(batches):
                found["norms"].append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
    return found | {"weights": norms(model.state_dict())}


def sharded(stage, *, build=net, folder=None, resume=None, **options):
    from shardline.integrations.accelerate import Accelerator

    fresh()
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=WINDOW,
        step_scheduler_with_optimizer=False,
        shardline=None if stage is None else config(stage),
        **options,
    )
    model = build()
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    loader = torch.utils.data.DataLoader(dataset(), batch_size=4 // world())
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    engine = accelerator.engine_of(model)
    assert accelerator.unwrap_model(model) is model is engine.module
    if resume is not None:
        accelerator.load_state(resume)
    found = {"losses": [], "norms": []}
    for epoch in range(EPOCHS):
        if epoch == 1 and folder is not None:
            accelerator.save_state(folder)
            F.mse_loss(model(next(iter(loader))[0]), torch.zeros(1)).backward()  # what a load takes back
            accelerator.load_state(folder)
        if epoch == 0 and resume is not None:
            continue
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.mse_loss(model(x), y)
                accelerator.backward(loss)
                found["losses"].append(accelerator.reduce(loss.detach(), "mean").item())
                if accelerator.sync_gradients:
                    found["norms"].append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
                optimizer.step()
                if accelerator.sync_gradients:
                    scheduler.step()
                optimizer.zero_grad()
    found["weights"] = norms(accelerator.get_state_dict(model))
    accelerator.free_memory(model, optimizer)
    return found | {"after": norms(model.state_dict())}


def each(stages, **options):
    found = [sharded(stage, **options) for stage in stages]
    for figures in found:
        assert figures.pop("after") == figures["weights"]
    return found


def test_its_figures_are_those_of_a_plain_loop(ranks) -> None:
    wanted = plain()
    for count in (1, 2):
        for found in ranks(each, count, STAGES):
            for figures in found:
                assert_alike(figures, wanted)
    for found in ranks(each, 2, (1, 3), dynamo_backend="aot_eager"):
        for figures in found:
            assert_alike(figures, wanted)


def test_a_state_is_saved_and_loaded_at_another_stage_and_number_of_ranks(ranks, tmp_path) -> None:
    wanted = plain()
    for figures in ranks(sharded, 2, 3, folder=str(tmp_path)):
        assert figures.pop("after")
        assert_alike(figures, wanted)
    assert sorted(path.name for path in (tmp_path / "shardline").iterdir() if path.is_dir())
    for count, stage in ((1, 0), (2, 2)):
        for figures in ranks(sharded, count, stage, resume=str(tmp_path)):
            assert figures["losses"] == pytest.approx(wanted["losses"][5:], rel=1e-5)
            assert figures["weights"] == pytest.approx(wanted["weights"], rel=1e-5)


def lower(stage, precision):
    found = sharded(stage, mixed_precision=precision)
    return found["losses"]


def test_mixed_precision_is_accelerates(ranks) -> None:
    wanted = plain()["losses"]
    for stage in (0, 3):
        for losses in ranks(lower, 2, stage, "bf16"):
            assert losses == pytest.approx(wanted, rel=5e-2, abs=2e-2)


def two_models(stage):
    """A generator and its critic, each with an engine; the critic is prepared first, its optimizer later."""
    from shardline.integrations.accelerate import Accelerator

    fresh()
    accelerator = Accelerator(cpu=True, shardline=config(stage))
    generator, critic = net(), nn.Linear(1, 1)
    critic = accelerator.prepare(critic)
    generator, first = accelerator.prepare(generator, torch.optim.SGD(generator.parameters(), lr=0.1))
    second = accelerator.prepare(torch.optim.SGD(critic.parameters(), lr=0.1))
    losses = []
    for _ in range(3):
        x = dataset().tensors[0][:4]
        loss = critic(generator(x)).square().mean()
        accelerator.backward(loss)
        first.step()
        second.step()
        losses.append(loss.item())
    count = len(accelerator.engines)
    accelerator.free_memory(generator, critic)
    return count, losses


def test_two_models_have_two_engines(ranks) -> None:
    for stage in (0, 3):
        for count, losses in ranks(two_models, 2, stage):
            assert count == 2 and losses[-1] < losses[0]


def mistakes(folder):
    from shardline.integrations.accelerate import Accelerator

    fresh()
    accelerator = Accelerator(cpu=True, shardline=config(2))
    model, other = net(), net()
    both = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    engine = shardline.shard(other, torch.optim.SGD(other.parameters(), lr=0.1), config(2))
    said = [
        attempt(accelerator.prepare, torch.optim.SGD(model.parameters(), lr=0.1)),
        attempt(accelerator.prepare, model, other, both),
        attempt(accelerator.prepare, engine),
    ]
    engine.destroy()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.save_state(folder)
    accelerator.wait_for_everyone()
    said.append(attempt(optimizer.load_state_dict, torch.load(f"{folder}/optimizer.bin")))
    said.append(attempt(accelerator.load_state, "/"))
    accelerator.free_memory(model)
    return said


def test_mistakes_are_said(ranks, tmp_path) -> None:
    for alone, shared, engine, held, lack in ranks(mistakes, 2, str(tmp_path)):
        assert is_sentence(alone, "UsageError", "together with an optimizer")
        assert is_sentence(shared, "UsageError", "not all of one model")
        assert is_sentence(engine, "UsageError", "the model and the optimizer")
        assert is_sentence(held, "CheckpointError", "accelerator.load_state()")
        assert is_sentence(lack, "CheckpointError", "holds no checkpoint of Shardline")


def with_lora(stage):
    from shardline.integrations.accelerate import Accelerator

    fresh()
    accelerator = Accelerator(cpu=True, shardline=config(stage))
    model = lora(gpt())
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    if stage is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.randint(0, 32, (4, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        text = model.generate(input_ids=ids[:2, :4], max_new_tokens=4, do_sample=False).flatten().tolist()
    accelerator.free_memory(model)
    return {"losses": losses, "text": text}


def test_lora_and_generation(ranks) -> None:
    wanted = ranks(with_lora, 1, None)[0]
    for stage in STAGES:
        for figures in ranks(with_lora, 2, stage):
            assert_alike(figures, wanted)
