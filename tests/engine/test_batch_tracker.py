"""Batches: the weights of the user's and of the engine's own loader, and what is told of short ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardline
from shardline.checkpoint.engine.window import WindowStart
from shardline.config import load_config
from shardline.data import Loader
from shardline.engine.batch_tracker import BatchTracker
from shardline.engine.notices import Notices
from shardline.events import Events
from shardline.sharding.window import State, Window
from tests.engine.cases import SGD, attempt, is_sentence
from tests.harness import seeded
from tests.models import Mlp, regression


def weight_of_a_short_batch():
    class Five(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, i):
            return tuple(part[i] for part in regression(5))

    config = SGD.config(1) | {"data_loader": {"shuffle": False}}
    engine, _, loader, _ = shardline.initialize(model=seeded(Mlp), config=config, training_data=Five())
    said = []
    for x, y in loader:
        engine.backward(F.mse_loss(engine(x), y, reduction="sum"))
        said.append(attempt(engine.step, weight=float(len(x))))
    engine.destroy()
    return said


def test_sums_and_the_loaders_own_weights_do_not_mix(ranks) -> None:
    (said,) = ranks(weight_of_a_short_batch, 1)
    assert said[0] is None and is_sentence(said[1], "UsageError", '"weighting": "none"', "0.25")


def tracker_of(accumulation=2, weighting="samples"):
    config = load_config(
        {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": accumulation,
            "data_loader": {"weighting": weighting},
        },
        1,
    )
    events, window, model = Events(), Window(accumulation), nn.Linear(2, 2)
    told = []
    events.subscribe(told.append)
    return BatchTracker(config, window, WindowStart(model, torch.device("cpu")), Notices(events)), window, told


@pytest.mark.parametrize(("weighting", "last"), [("samples", 0.75), ("none", 1.0)])
def test_the_engines_loader_says_how_much_a_batch_counts(weighting, last) -> None:
    """Seven samples in batches of four: the second holds three quarters of a full one."""
    tracker, window, _ = tracker_of(weighting=weighting)
    loader = Loader(
        list(range(7)), global_batch=8, micro_batch=4, accumulation=2, rank=0, world_size=1, seed=0, shuffle=False
    )
    tracker.attach(loader)
    start, shares, samples = tracker.position, [], []
    for batch in loader:
        assert window.state is not State.EMPTY
        shares.append(tracker.share())
        samples.append(tracker.samples)
        window.add_step(tracker.share(), None, tracker.samples)
        tracker.end_micro_step()
        assert tracker.share() == 1.0 and tracker.samples == 4, "of a batch that the loader has not handed out"
        del batch
    assert shares == [1.0, last] and samples == [4, 3]
    assert tracker.position == loader.position != start
    tracker.close()
    assert loader.on_batch is None


def test_a_short_batch_of_the_users_is_told_of_once() -> None:
    tracker, _, told = tracker_of()
    for rows in (4, 4, 3, 2):
        tracker.note_inputs((torch.ones(rows, 2),), {})
        assert tracker.share() == 1.0 and tracker.samples == 4
        tracker.warn_of_short_batch()
    assert [notice.message for notice in told] == [notice.message for notice in told[:1]]
    assert "a batch of 3 samples counts as one of 4" in told[0].message
