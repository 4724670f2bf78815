"""What is told of steps once their verdict is known."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from shardline.errors import NonFiniteError
from shardline.events import Notice, StepDone, StepSkipped
from tests.harness import Setup, start
from tests.models import Mlp, mse, regression


def listen(config):
    engine = start(Mlp, config)
    events = []
    engine.events.subscribe(events.append)
    losses = []
    for seed in range(4):
        loss = mse(engine, engine.module, regression(4, seed=seed))
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    engine.backward(mse(engine, engine.module, regression(4)))
    engine.destroy()
    done = [(e.step, float(e.loss), e.lr, e.samples, e.loss_scale) for e in events if isinstance(e, StepDone)]
    return losses, done, [e.message for e in events if isinstance(e, Notice)]


def test_what_is_told_of_steps(ranks) -> None:
    setup = Setup("fp32", "SGD", accumulation=2)
    for losses, done, notices in ranks(listen, 2, setup.config(1)):
        means = [sum(losses[:2]) / 2, sum(losses[2:]) / 2]
        assert done == [(i + 1, pytest.approx(mean, rel=1e-6), [5e-2], 16, None) for i, mean in enumerate(means)]
        assert notices == ["destroy() discards the gradients of a backward, which no step has applied"]


def skip(config, what):
    """Steps whose gradients are not finite, with a good one between; what was raised, and reasons of skipped steps."""
    engine = start(Mlp, config)
    events = []
    engine.events.subscribe(events.append)
    before = engine.full_state_dict()
    raised = None
    for step in range(8):
        loss = mse(engine, engine.module, regression(4, seed=step))
        if what == "gradient":
            loss = loss + (loss * 0).sqrt()  # its gradient is 0 * inf
        elif step != 1:
            loss = loss * float("nan")
        try:
            engine.backward(loss)
            engine.step()
        except NonFiniteError as error:
            raised = step, str(error)
            break
    after = engine.full_state_dict()
    same = all(torch.equal(before[name], after[name]) for name in before)
    engine.destroy()
    return raised, [event.reason for event in events if isinstance(event, StepSkipped)], same


def test_a_run_that_only_skips_ends_with_advice(ranks) -> None:
    config = Setup("fp32", "SGD").config(2) | {"max_skipped_steps": 3}
    for raised, reasons, _ in ranks(skip, 2, config, "loss"):
        step, text = raised
        assert step == 5, "steps 3 to 5 were skipped in a row, and step 2 was applied"
        assert text.startswith(
            "3 steps in a row were skipped, the last is step 5: their gradients were not finite, and so"
        )
        assert "as the loss was not" in reasons[0] and text.endswith("[SL302]")
    assert ranks(skip, 2, config | {"max_skipped_steps": None}, "loss")[0][0] is None


def test_a_finite_loss_is_told_apart(ranks) -> None:
    config = Setup("fp32", "SGD").config(1) | {"max_skipped_steps": 2}
    for raised, reasons, same in ranks(skip, 2, config, "gradient"):
        assert "not finite, of a finite loss (" in raised[1] and same
        assert reasons == ["gradients that are not finite"] * 2


def leave_out(config):
    """Rank 1 leaves out its second backward; then it says that it has no data."""
    engine = start(Mlp, config)
    notices = []
    engine.events.subscribe(lambda event: notices.append(event.message) if isinstance(event, Notice) else None)
    for step in range(3):
        x, y = regression(4, seed=step)
        loss = mse(engine, engine.module, (x, y))
        idle = dist.get_rank() == 1 and step == 1
        if not idle:
            engine.backward(loss)
        engine.step()
    engine.backward(mse(engine, engine.module, regression(4)) * 4)
    engine.step(weight=4)
    if dist.get_rank() == 0:
        engine.backward(mse(engine, engine.module, regression(4)) * 4)
    engine.step(weight=4 if dist.get_rank() == 0 else 0)
    engine.destroy()
    return notices


@pytest.mark.parametrize("stage", [0, 2])
def test_a_backward_that_one_rank_leaves_out_is_no_secret(ranks, stage) -> None:
    for notices in ranks(leave_out, 2, Setup("fp32", "SGD").config(stage)):
        assert [text for text in notices if "backward" in text] == [
            "in step 2 rank 1 had no backward, and the others had: the gradients of these ranks count as zeros in the "
            "average. A rank without data passes step(weight=0), and all others their weights"
        ]
