"""Loaders that the user brings: their positions are saved and loaded as that of the engine's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import shardline
from shardline.errors import CheckpointError, UsageError
from shardline.events import Notice
from shardline.testing import RankFailed
from tests.checkpoint import cases


class Cards:
    """A loader of one's own: each epoch another order, from a generator whose state is a tensor; its state is live."""

    def __init__(self, seed: int, size: int = 6) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.size = size
        self.state = {"epoch": 0, "drawn": [], "left": self.shuffled()}

    def shuffled(self):
        return tuple(torch.randperm(self.size, generator=self.generator).tolist())

    def __iter__(self):
        while self.state["left"]:
            card, *left = self.state["left"]
            self.state["left"] = tuple(left)
            self.state["drawn"].append(card)
            yield card
        self.state |= {"epoch": self.state["epoch"] + 1, "left": self.shuffled()}
        self.state["drawn"].clear()

    def state_dict(self):
        return self.state | {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.state = {key: value for key, value in state.items() if key != "generator"}


def start(settings, loader, path=None, **options):
    """An engine with its user's loader; loads ``path`` before the loader is registered where ``late``."""
    torch.manual_seed(0)
    engine = shardline.initialize(model=torch.nn.Linear(cases.WIDTH, 4), config=settings)[0]
    engine.events.subscribe(lambda event: said.append(event.message) if isinstance(event, Notice) else None)
    said = engine.client_state.setdefault("said", []) if "said" in options else []
    late = options.get("late", False)
    if path is not None and late:
        assert engine.load_checkpoint(path)[0]
    assert engine.register_loader(loader) is loader
    if path is not None and not late:
        assert engine.load_checkpoint(path)[0]
    return engine, said


def train(engine, loader, micro_steps, save_at=None, path=None):
    """The cards drawn; the loss of each is made of it. Saves right after a card was drawn, before its forward."""
    drawn = []
    while engine.micro_steps < micro_steps:
        for card in loader:
            if engine.micro_steps == save_at:
                engine.save_checkpoint(path)
            drawn.append(card)
            inputs = torch.full((2, cases.WIDTH), card / 10 + dist.get_rank())
            engine.backward(engine(inputs).square().mean())
            engine.step()
            if engine.micro_steps >= micro_steps:
                break
    return drawn


def settings_of(accumulation=2, **more):
    return {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}, "zero_optimization": {"stage": 2},
    } | more  # fmt: skip


def interrupted(path, save_at, late, seeds=(1, 2)):
    """Cards and weights of a run that is saved and goes on, and of one that resumes from there."""
    rank = dist.get_rank()
    loader = Cards(seeds[rank])
    engine, _ = start(settings_of(), loader)
    drawn = train(engine, loader, 20, save_at, path)
    straight = drawn, engine.full_state_dict()
    engine.destroy()
    other = Cards(99)
    engine, said = start(settings_of(), other, path, late=late)
    begun = engine.micro_steps
    resumed = drawn[:begun] + train(engine, other, 20), engine.full_state_dict()
    engine.destroy()
    return begun, straight, resumed, said


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("save_at", "begun"), [(0, 0), (6, 6), (7, 6), (12, 12)])
def test_it_goes_on_where_the_window_began(ranks, tmp_path, save_at, begun, late):
    """At an end of an epoch (6, 12), inside a window (7), before the first step; registered before and after a load."""
    for at, (drawn, weights), (again, resumed), said in ranks(interrupted, 2, str(tmp_path), save_at, late):
        assert at == begun and again == drawn and not said
        assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def automatic(path):
    config = settings_of(1, checkpoint={"dir": path, "every_steps": 2, "resume": "auto"})
    loader = Cards(dist.get_rank())
    engine, _ = start(config, loader)
    begun, drawn = engine.global_steps, train(engine, loader, 5)
    engine.destroy()
    return begun, drawn


def test_a_resume_by_itself(ranks, tmp_path):
    first, second = ranks(automatic, 2, str(tmp_path)), ranks(automatic, 2, str(tmp_path))
    for (begun, drawn), (again, rest) in zip(first, second, strict=True):
        assert (begun, again) == (0, 4) and rest == drawn[4:]


def saved(path, seeds):
    loader = Cards(seeds[dist.get_rank()])
    engine, _ = start(settings_of(1), loader)
    train(engine, loader, 3, 2, path)
    engine.destroy()


def loaded(path, late):
    loader = Cards(0)
    engine, _ = start(settings_of(1), loader, path, late=late)
    drawn = train(engine, loader, 6)
    engine.destroy()
    return drawn


def test_at_another_number_of_ranks(ranks, tmp_path):
    ranks(saved, 2, str(tmp_path / "same"), (5, 5))
    ranks(saved, 2, str(tmp_path / "own"), (5, 6))
    straight = list(Cards(5))
    assert ranks(loaded, 1, str(tmp_path / "same"), False) == [straight[2:]]
    with pytest.raises(
        RankFailed, match=r"loaders \['loader'\] on 2 ranks, each of which had its own; the number .* is 1"
    ):
        ranks(loaded, 1, str(tmp_path / "own"), False)


class Broken(Cards):
    def load_state_dict(self, state):
        if dist.get_rank() == 1:
            raise KeyError("shuffle")
        super().load_state_dict(state)


class Unsaveable(Cards):
    def state_dict(self):
        return {"seen": {1, 2} if dist.get_rank() == 1 else [1, 2]}


def refusals(path):
    """What is said of loaders that cannot be kept."""
    rank, said = dist.get_rank(), []

    def note(kind, call):
        with pytest.raises(kind) as caught:
            call()
        said.append(str(caught.value))

    engine, told = start(settings_of(1), Cards(1))
    note(UsageError, lambda: engine.register_loader([1, 2]))
    note(UsageError, lambda: engine.register_loader(Cards(1)))
    train(engine, Cards(1), 1)
    engine.save_checkpoint(path, tag="one")
    engine.register_loader(Unsaveable(1), name="second")
    note(CheckpointError, lambda: engine.save_checkpoint(path, tag="two"))
    engine.load_checkpoint(path, "one")
    engine.destroy()
    engine, _ = start(settings_of(1), Broken(1))
    note(CheckpointError, lambda: engine.load_checkpoint(path))
    engine.load_checkpoint(path, load_data_position=False)
    engine.destroy()
    engine, _ = start(settings_of(1), Cards(1))
    if rank == 1:
        engine.register_loader(Cards(3), name="alone")
    note(shardline.errors.DisagreementError, lambda: engine.save_checkpoint(path, tag="three"))
    engine.destroy()
    return said, told


def test_what_cannot_be_kept(ranks, tmp_path):
    for said, told in ranks(refusals, 2, str(tmp_path)):
        no_state, twice, value, broken, alone = said
        assert "is a list, which has no state_dict() and load_state_dict()" in no_state
        assert "There is a loader 'loader' already" in twice
        assert "on rank 1: loaders['second']['seen'] is a builtins.set" in value
        assert "on rank 1: The loader 'loader' (Broken) does not take the position" in broken
        assert "KeyError: 'shuffle'" in broken and "load_data_position=False" in broken
        assert 'rank 1 has ["alone", "loader"]' in alone
        assert any("holds no position of the loader 'second', which stays where it is" in each for each in told)
    assert sorted(path.name for path in Path(tmp_path).glob("[a-z]*")) == ["latest", "one"]
