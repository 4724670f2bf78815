"""Ranks that disagree are found and named, on every rank: at `initialize`, and at each step before a weight changes."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from tests.harness import STAGES, Setup, seeded, start
from tests.models import Mlp, regression


def another_config(config):
    return seeded(Mlp), config | {"gradient_clipping": 0.5}


def another_rate(config):
    return seeded(Mlp), config | {"optimizer": {"type": "AdamW", "params": {"lr": 0.3}}}


def another_stage(config):
    return seeded(Mlp), config | {"zero_optimization": {**config["zero_optimization"], "stage": 1}}


def another_shape(config):
    model = seeded(Mlp)
    model.head = nn.Linear(32, 33)
    return model, config


def one_more_parameter(config):
    model = seeded(Mlp)
    model.extra = nn.Parameter(torch.zeros(3))
    return model, config


def another_name(config):
    model = seeded(Mlp)
    model.tail = model.head
    del model.head
    return model, config


def one_frozen(config):
    model = seeded(Mlp)
    model.blocks[1].up.weight.requires_grad_(False)
    return model, config


def another_torch(config):
    torch.__version__ = "9.9.9"
    return seeded(Mlp), config


DIFFERENCES = {
    f.__name__: f
    for f in (
        another_config,
        another_rate,
        another_stage,
        another_shape,
        one_more_parameter,
        another_name,
        one_frozen,
        another_torch,
    )
}

WORDS = {
    "another_config": "gradient_clipping",
    "another_rate": "lr",
    "another_stage": "stage",
    "another_shape": "head",
    "one_more_parameter": "number of parameters",
    "another_name": "head.weight",
    "one_frozen": "blocks.1.up.weight",
    "another_torch": "9.9.9",
}


def differ(what, who, config):
    import shardline

    version = torch.__version__
    model, config = DIFFERENCES[what](config) if dist.get_rank() == who else (seeded(Mlp), config)
    try:
        shardline.initialize(model=model, config=config)
    except shardline.errors.DisagreementError as error:
        return str(error)
    finally:
        torch.__version__ = version
    return None


@pytest.mark.parametrize("stage", [STAGES[0], STAGES[3]])
@pytest.mark.parametrize("what", DIFFERENCES)
def test_found_and_named(ranks, what, stage):
    for error in ranks(differ, 3, what, 2, Setup().config(stage), timeout=20):
        assert error is not None
        assert WORDS[what] in error
        assert "rank 2" in error.lower()


# --- at each step: options of the optimizer ---------------------------------------------------------------------------


def one_step(engine, seed=0):
    x, y = regression(4, seed=seed + dist.get_rank())
    engine.backward(F.mse_loss(engine(x).float(), y))
    engine.step()


def other_lr(group):
    group["lr"] = 0.05


def other_decay(group):
    group["weight_decay"] = 0.5


def other_betas(group):
    group["betas"] = (0.9, 0.9)


def lr_as_tensor(group):
    group["lr"] = torch.tensor(0.75)


OPTIONS = {
    "other_lr": "lr of param group 0 is 0.01 on ranks 0, 1, 0.05 on rank 2",
    "other_decay": r"weight_decay of param group 0 is 0\.\d+ on ranks 0, 1, 0.5 on rank 2",
    "other_betas": r"betas\[1\] of param group 0 is 0.99 on ranks 0, 1, 0.9 on rank 2",
    "lr_as_tensor": "lr of param group 0 is 0.01 on ranks 0, 1, 0.75 on rank 2",
}


def options_differ(config, late):
    """For each change on rank 2: what is said, whether a weight moved; and that the next step is a step."""
    import shardline

    engine = start(Mlp, config)
    if late:  # as on an accelerator: no rank waits for the verdict
        engine.trainables.boundary.reads_at_once = False
    one_step(engine)
    said = []
    (group,) = engine.optimizer.param_groups
    for what in OPTIONS:
        kept, before = dict(group), engine.full_state_dict()
        if dist.get_rank() == 2:
            globals()[what](group)
        try:
            one_step(engine)
            assert late, "the step was applied"
            if dist.get_rank() == 1:  # one rank reads the verdict, and no other waits
                assert not engine.was_step_applied() and engine.skipped_steps == 0
            one_step(engine)
        except shardline.errors.DisagreementError as error:
            said.append(str(error))
        group.update(kept)
        after = engine.full_state_dict()
        assert all(torch.equal(value, before[name]) for name, value in after.items()), what
        engine.zero_grad()
    one_step(engine)
    one_step(engine)
    group["lr"] += dist.get_rank()
    notices = []
    engine.events.subscribe(lambda event: notices.append(getattr(event, "message", "")))
    if late:  # no rank reads any more
        one_step(engine)
    group["lr"] -= dist.get_rank()
    moved = not torch.equal(engine.full_state_dict()["head.weight"], before["head.weight"])
    engine.destroy()
    assert any("was not applied" in notice for notice in notices) == late
    return said, moved


@pytest.mark.parametrize("late", [False, True], ids=["at once", "a step late"])
@pytest.mark.parametrize("stage", STAGES)
def test_options_that_differ_by_rank(ranks, stage, late):
    config = Setup(optimizer="AdamW").config(stage)
    config["optimizer"]["params"]["lr"] = 0.01
    for said, moved in ranks(options_differ, 3, config, late):
        assert len(said) == len(OPTIONS) and moved
        for text, words in zip(said, OPTIONS.values(), strict=True):
            assert re.search(words, text), text
            assert ("the step before" if late else "this step") + " was not applied" in text


def plateau(config):
    """A scheduler on a metric of each rank's own."""
    import shardline

    engine = start(Mlp, config)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(engine.optimizer, patience=0, factor=0.5)
    try:
        for step in range(4):
            one_step(engine, step)
            scheduler.step(1.0 if dist.get_rank() else 1.0 / (step + 1))
    except shardline.errors.DisagreementError as error:
        return str(error), engine.global_steps
    finally:
        engine.destroy()
    return None, engine.global_steps


@pytest.mark.parametrize("stage", [STAGES[0], STAGES[3]])
def test_a_scheduler_on_a_local_metric(ranks, stage):
    for said, steps in ranks(plateau, 2, Setup().config(stage)):
        assert re.search(r"lr of param group 0 is \S+ on rank 0, \S+ on rank 1", said) and "all-reduce" in said
        assert steps == 2


# --- the data ---------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return ((torch.ones(32), torch.ones(32)) for _ in range(self.samples))


class Sharded(Stream):
    sharded = True

    def __len__(self):
        return self.samples


class Ending(Dataset):
    """Raises StopIteration for one sample, as a bare next() does."""

    def __init__(self, bad):
        self.bad = bad

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return (torch.ones(32), torch.ones(32)) if i != self.bad else next(iter(()))


def indexed(samples):
    return TensorDataset(torch.ones(samples, 32), torch.ones(samples, 32))


def lengths():
    return indexed(40 - dist.get_rank())


def no_data_on_one():
    return indexed(40) if dist.get_rank() == 0 else None


def lengths_of_parts():
    return Sharded(40 - dist.get_rank())


def streams_of_other_lengths():
    return Stream(39 - dist.get_rank())


def stop_iteration():
    return Ending(17)


def same():
    return indexed(40)


def no_trick(engine, loader, step):
    pass


def peek(engine, loader, step):
    if step == 1 and dist.get_rank() == 1:
        next(iter(loader))


def peek_and_go_back(engine, loader, step):
    if step == 1 and dist.get_rank() == 1:
        state = loader.state_dict()
        next(iter(loader))
        loader.load_state_dict(state)


def another_epoch(engine, loader, step):
    if step == 1 and dist.get_rank() == 1:
        loader.set_epoch(3)


def another_order(engine, loader, step):
    if step == 0 and dist.get_rank() == 1:
        loader._state.order.seed += 1


def train_on(config, data, trick):
    """What is said, and after how many steps."""
    import shardline

    engine = None
    try:
        engine, _, loader, _ = shardline.initialize(model=seeded(Mlp), training_data=data(), config=config)
        trick(engine, loader, 0)
        for x, y in loader if loader is not None else ():
            engine.backward(F.mse_loss(engine(x), y))
            engine.step()
            if engine.global_steps == 1:
                trick(engine, loader, 1)
                if trick is not no_trick:
                    for x, y in loader:
                        engine.backward(F.mse_loss(engine(x), y))
                        engine.step()
                    break
        return None, engine.global_steps
    except shardline.ShardlineError as error:
        return f"{type(error).__name__}: {error}", getattr(engine, "global_steps", 0)
    finally:
        if engine is not None:
            try:
                engine.destroy()
            except shardline.ShardlineError:  # the other rank gave up in the middle of a step
                engine.comm.close()


LENGTHS = "DisagreementError.*length of training_data: rank 0 has 40, rank 1 has "
DIGEST = "one with the digest [0-9a-f]{8}"
DATA = {
    (lengths, no_trick): (0, LENGTHS + "39"),
    (no_data_on_one, no_trick): (0, LENGTHS + ".no dataset"),
    (lengths_of_parts, no_trick): (0, LENGTHS + "39"),
    (streams_of_other_lengths, no_trick): (3, "DisagreementError.*is 9 samples on rank 0, 8 samples on rank 1"),
    (stop_iteration, no_trick): (None, "DataError: .*Ending.*StopIteration.*sample 17 of epoch 0"),
    (same, peek): (1, "DisagreementError.*global batch 2 of epoch 0 on rank 0, .*global batch 3 of epoch 0 on rank 1"),
    (same, another_epoch): (1, "DisagreementError.*of epoch 0 on rank 0, .*of epoch 3 on rank 1"),
    (same, another_order): (0, f"DisagreementError.*{DIGEST} on rank 0, {DIGEST} on rank 1"),
    (same, no_trick): (4, None),
    (same, peek_and_go_back): (4, None),
}  # fmt: skip


def all_of(config):
    return [train_on(config, data, trick) for data, trick in DATA]


@pytest.mark.parametrize("stage", [STAGES[0], STAGES[3]])
def test_the_data_is_one_sequence(ranks, stage):
    config = Setup().config(stage) | {"train_micro_batch_size_per_gpu": 5}
    found = zip(*ranks(all_of, 2, config, timeout=100), strict=True)
    for (case, (steps, words)), sides in zip(DATA.items(), found, strict=True):
        where = [each.__name__ for each in case]
        for said, done in sides:
            assert (said is None) == (words is None) and re.search(words or "", said or ""), (where, sides)
            assert steps is None or done == steps, (where, sides)
