"""Swap: two ranks that gather equal-sized units in different orders must not train on each other's weights.

The step equals the twin's, in which a block that a rank skipped has a zero gradient there.
"""

from __future__ import annotations

import pytest
import torch.distributed as dist
import torch.nn.functional as F

from tests.harness import STAGES, Setup, assert_close, assert_ranks_agree, seeded, spread, start
from tests.models import Mlp, regression

SKIPS = {
    "skip": [{0: (2,), 1: (3,)}, {0: (2,), 1: (3,)}, {}],
    "skip both ends": [{0: (0, 1), 1: (2, 3)}, {1: (0,)}, {}],
    "skip on one rank": [{}, {1: (1, 2)}, {}],
    "skip all": [{0: (0, 1, 2, 3)}, {1: (0, 1, 2, 3)}, {}],
}
ORDERS = {
    "swapped": [{0: (0, 1, 2, 3), 1: (0, 2, 1, 3)}, {0: (0, 1, 2, 3), 1: (0, 2, 1, 3)}, {}],
    "reversed": [{}, {1: (3, 2, 1, 0)}, {}],
}


def branch(plan, argument, batches, config, late=None):
    """Train; per rank the state and, where the engine refused, what it said.

    ``late``: verdicts are read one step late, as on an accelerator; if "and by one rank", rank 1 asks before.
    """
    from shardline.errors import DisagreementError

    rank = dist.get_rank()
    engine = start(Mlp, config)
    if late:
        engine.trainables.boundary.reads_at_once = False
    error = None
    try:
        for choice, window in zip(plan, batches, strict=True):
            for micro in window:
                x, y = micro[rank]
                kwargs = {argument: choice[rank]} if rank in choice else {}
                engine.backward(F.mse_loss(engine(x, **kwargs), y))
                engine.step()
                if late == "and by one rank" and rank == 1:
                    assert engine.was_step_applied() and not engine.skipped_steps
    except DisagreementError as raised:
        error = str(raised)
    state, skipped = engine.full_state_dict(), engine.skipped_steps
    engine.destroy()
    return state, error, skipped


def expected_state(plan, argument, batches, setup):
    twin = setup.twin(seeded(Mlp))
    for choice, window in zip(plan, batches, strict=True):
        for micro in window:
            for rank, (x, y) in enumerate(micro):
                kwargs = {argument: choice[rank]} if rank in choice else {}
                twin.backward(F.mse_loss(twin.model(x, **kwargs), y))
        twin.step()
    return twin.state()


def check(ranks, plan, argument, stage, setup, world=2, late=None):
    batches = spread(regression, len(plan), setup, world)
    results = ranks(branch, world, plan, argument, batches, setup.config(stage), late, timeout=20)
    assert_ranks_agree([state for state, _, _ in results])
    if any(skipped for _, _, skipped in results):
        # Where verdicts are read late, late gradients of a rank that jumped ahead in a backward cost the step.
        assert argument == "order" and [skipped for _, _, skipped in results] == [1] * world
    elif results[0][1] is None:
        assert_close(results[0][0], expected_state(plan, argument, batches, setup))
    else:
        pytest.fail(f"refused: {results[0][1]}")


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("plan", SKIPS)
def test_skipped_blocks(ranks, plan, optimizer):
    check(ranks, SKIPS[plan], "skip", 3, Setup(optimizer=optimizer))


@pytest.mark.parametrize("stage", STAGES[:3])
def test_skipped_blocks_at_other_stages(ranks, stage):
    check(ranks, SKIPS["skip"], "skip", stage, Setup(clip=0.1))


@pytest.mark.parametrize("plan", SKIPS)
def test_skipped_blocks_while_accumulating(ranks, plan):
    check(ranks, SKIPS[plan], "skip", 3, Setup(accumulation=2))


def test_skipped_blocks_kept_whole_between_forward_and_backward(ranks):
    check(ranks, SKIPS["skip"], "skip", 3, Setup(zero={"reshard_after_forward": False}))


def test_three_ranks(ranks):
    check(ranks, [{0: (2,), 1: (3,), 2: (0, 1)}, {2: (0,)}, {}], "skip", 3, Setup(), world=3)


@pytest.mark.parametrize("plan", ORDERS)
def test_another_order(ranks, plan):
    """The second step's ranks disagree from an order that the first step may have recorded."""
    check(ranks, ORDERS[plan], "order", 3, Setup())


def test_order_after_it_was_agreed(ranks):
    check(ranks, [{}, {}, {}, ORDERS["swapped"][0], {}], "order", 3, Setup())


@pytest.mark.parametrize("late", ["by all", "and by one rank"])
def test_orders_are_adopted_with_their_own_verdict(ranks, late):
    """Ranks first differ in a step that ends before the step before it is settled."""
    swapped = ORDERS["swapped"][0]
    for plan in ([{}, {}, swapped, swapped, {}, {}], [ORDERS["reversed"][1], {}, {}, swapped, {}]):
        check(ranks, plan, "order", 3, Setup(), late=late)
