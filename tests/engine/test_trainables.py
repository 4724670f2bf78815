"""What is trained: when that may change, and edits that rounding holds back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardline.events import Notice
from tests.engine.cases import SGD, attempt, is_sentence, sgd_by_hand
from tests.harness import Setup, assert_close, start
from tests.models import Mlp, mse, regression


def changed_in_a_window(config):
    engine = start(Mlp, config)
    engine.backward(mse(engine, engine.module, regression(4)))
    engine.module.head.bias.requires_grad_(False)
    said = attempt(engine.step)
    engine.destroy()
    return said


def test_freezing_inside_a_window_is_refused(ranks) -> None:
    for said in ranks(changed_in_a_window, 2, SGD.config(2)):
        assert is_sentence(said, "UsageError", "requires_grad", "window")


def follow(config, decay, by_data, steps):
    """What is told of a frozen bf16 teacher that follows its student, and what a save of the module needs."""
    engine = start(Taught, config)
    events = []
    engine.events.subscribe(events.append)
    for seed in range(steps):
        engine.backward(mse(engine, engine.module, regression(4, seed=seed)))
        engine.step()
        with engine.gathered_parameters(write=True), torch.no_grad():
            model = engine.module
            for ours, theirs in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
                (ours.data if by_data else ours).mul_(decay).add_(theirs, alpha=1 - decay)
    engine.destroy()
    return [e.message for e in events if isinstance(e, Notice)]


class Taught(nn.Module):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Linear(32, 32), nn.Linear(32, 32).requires_grad_(False)

    def forward(self, x):
        x = x.to(self.student.weight.dtype)
        return self.student(x) + self.teacher(x)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_frozen_weight_that_rounding_holds_back_is_told_once(ranks, stage) -> None:
    bf16 = Setup("bf16", "SGD").config(stage)
    for by_data in (False, True):
        for (notice,) in ranks(follow, 2, bf16, 0.999, by_data, 55):
            assert "'teacher." in notice and "torch.bfloat16 rounds away" in notice and "module_dtypes" in notice
    assert ranks(follow, 2, bf16, 0.5, False, 55) == [[], []], "an average that moves"
    assert ranks(follow, 2, bf16, 0.999, False, 20) == [[], []], "too early to tell"
    fp32 = bf16 | {"data_types": {"module_dtypes": {"Linear": "fp32"}}}
    assert ranks(follow, 2, fp32, 0.999, False, 55) == [[], []], "what the notice advises"


def frozen_around_a_forward(stage):
    """Between a forward and its backward, as a reference model without its adapters is asked."""
    engine = start(Mlp, SGD.config(stage))
    layouts = [engine.trainables.layout]
    for seed in range(2):
        loss = mse(engine, engine.module, regression(4, seed=seed))
        engine.module.blocks.requires_grad_(False)
        with torch.no_grad():
            engine(regression(4, seed=seed)[0])
        engine.module.blocks.requires_grad_(True)
        engine.backward(loss)
        engine.step()
        layouts.append(engine.trainables.layout)
    found = engine.full_state_dict(), all(each is layouts[0] for each in layouts)
    engine.destroy()
    return found


def test_freezing_around_a_forward_without_gradients_changes_nothing(ranks) -> None:
    want = sgd_by_hand([regression(4, seed=seed) for seed in range(2)])
    for stage in (0, 3):
        for state, same in ranks(frozen_around_a_forward, 2, stage):
            assert same
            assert_close(state, want)
