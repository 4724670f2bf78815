"""The engine as a module around the user's: what it is called with, and that it is neither copied nor wrapped."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from tests.engine.cases import SGD, attempt, is_sentence, train
from tests.harness import Setup, start
from tests.models import Mlp, regression


class Talkative(Mlp):
    greeting = "hello"

    @property
    def width(self):
        return self.head.in_features

    def greet(self, name):
        return f"{self.greeting}, {name}"


def as_a_module(config):
    engine = start(Talkative, config)
    facts = {
        "attribute": engine.greeting,
        "method": engine.greet("you"),
        "property": engine.width,
        "child": engine.blocks is engine.module.blocks,
        "missing": attempt(lambda: engine.no_such_thing),
        "module": isinstance(engine, nn.Module) and next(iter(engine.children())) is engine.module,
        "parameters": sum(1 for _ in engine.parameters()),
        "modes": [engine.eval().module.training, engine.train().module.blocks[0].training],
        "getters": (
            engine.train_batch_size(),
            engine.train_micro_batch_size_per_gpu(),
            engine.gradient_accumulation_steps(),
            engine.zero_optimization_stage(),
            engine.bfloat16_enabled(),
            engine.fp16_enabled(),
            engine.loss_scale,
            engine.get_lr(),
        ),
        "place": (engine.local_rank, engine.global_rank, engine.world_size, engine.device),
        "config": engine.config.get("zero_optimization", {}).get("stage"),
        "before": (engine.global_steps, engine.skipped_steps, engine.was_step_applied(), engine.get_global_grad_norm()),
    }
    engine.destroy()
    return facts


def test_the_engine_as_a_module(ranks) -> None:
    for rank, facts in enumerate(ranks(as_a_module, 2, Setup("bf16").config(3))):
        assert (facts["attribute"], facts["method"], facts["property"]) == ("hello", "hello, you", 32)
        assert facts["child"] and facts["module"] and facts["parameters"] == 18 and facts["modes"] == [False, True]
        assert facts["missing"][0] == "AttributeError" and "no_such_thing" in facts["missing"][1]
        assert facts["getters"] == (8, 4, 1, 3, True, False, 1.0, [1e-2])
        assert facts["place"] == (rank, rank, 2, torch.device("cpu")) and facts["config"] == 3
        assert facts["before"] == (0, 0, False, None)


def leave(config):
    """Ways in which an engine is copied, pickled, moved or wrapped; and its module, saved and loaded elsewhere."""
    engine = start(Mlp, config)
    said = {
        "deepcopy": attempt(copy.deepcopy, engine),
        "copy": attempt(copy.copy, engine),
        "pickle": attempt(pickle.dumps, engine),
        "save": attempt(torch.save, engine, io.BytesIO()),
        "ddp": attempt(nn.parallel.DistributedDataParallel, engine),
        "half": attempt(engine.half),
    }
    kinds = [type(p) for p in engine.parameters()]
    assert engine.to("cpu") is engine and engine.float() is engine and engine.to("cpu", torch.float32) is engine
    assert kinds == [type(p) for p in engine.parameters()]
    saved = io.BytesIO()
    with engine.gathered_parameters():
        torch.save(engine.module, saved)
        weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
        copied = copy.deepcopy(engine.module)
    again = io.BytesIO()
    torch.save(copied, again)
    names = b"shardline" in saved.getvalue(), b"shardline" in again.getvalue()
    loaded = []
    for file in (saved, again):
        file.seek(0)
        loaded.append(torch.load(file, weights_only=False))
    right = []
    for model in loaded:
        right.append(all(torch.equal(p, weights[name]) for name, p in model.named_parameters()))
        right.append(all(type(p) is nn.Parameter for p in model.parameters()))
        model(regression(4)[0]).sum().backward()
    train(engine)
    engine.destroy()
    return said, names, right


@pytest.mark.parametrize("stage", [0, 3])
def test_an_engine_is_neither_copied_nor_wrapped_and_its_module_is_saved_without_it(ranks, stage) -> None:
    for said, names, right in ranks(leave, 2, SGD.config(stage)):
        for way in ("deepcopy", "copy", "pickle", "save"):
            assert is_sentence(said[way], "UsageError", "an engine cannot be", "full_state_dict"), said[way]
        assert is_sentence(said["ddp"], "UsageError", "averages gradients itself"), said["ddp"]
        assert is_sentence(said["half"], "SealedError" if stage == 3 else "ModelError", "before shardline.initialize")
        assert names == (False, False) and right == [True] * 4
