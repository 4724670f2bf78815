"""The moving average of the weights, against one that a plain loop keeps of whole weights."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import shardline
from tests.engine.cases import attempt, is_sentence
from tests.harness import Setup, assert_close, assert_identical, seeded, start
from tests.models import Mlp, mse, regression


class Naive:
    """The same average of whole weights, by its formula."""

    def __init__(self, engine, decay, every=1, warmup=False):
        self.decay, self.every, self.warmup, self.updates = decay, every, warmup, 0
        self.average = {name: value.clone() for name, value in engine.full_state_dict().items()}

    def follow(self, engine, frozen=()):
        if not engine.was_step_applied() or engine.global_steps % self.every:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        self.updates += 1
        for name, value in engine.full_state_dict().items():
            if not name.startswith(frozen or "-"):
                self.average[name] = decay * self.average[name] + (1 - decay) * value


def batch(step):
    return regression(4, seed=100 * step + dist.get_rank())


def train(engine, steps, *follow, begin=0):
    for step in range(begin, begin + steps):
        engine.backward(mse(engine, engine.module, batch(step)))
        engine.step()
        for each in follow:
            each(engine)


def averaged(ema):
    with ema.applied():
        return ema.engine.full_state_dict()


def follow(setups, stages, options):
    """Each in turn: the averages, the naive ones, and the weights around a look at them."""
    return [_follow(setup, stage, options) for setup in setups for stage in stages]


def _follow(setup, stage, options):
    engine = start(Mlp, setup.config(stage))
    naive, ema = Naive(engine, **options), shardline.EMA(engine, **options)
    first, begun = averaged(ema), engine.full_state_dict()
    train(engine, 5, naive.follow)
    before, compute = engine.full_state_dict(), engine.module.head.weight.dtype
    x = batch(50)[0]
    with torch.no_grad():
        trained = engine(x)
        with ema.applied():
            whole = engine.full_state_dict()
            shown = engine(x)
        again = engine(x)
    plain = seeded(Mlp).to(compute)
    plain.load_state_dict(whole)
    result = {
        "start": (first, begun), "average": (whole, naive.average), "back": (engine.full_state_dict(), before),
        "updates": ema.updates, "naive updates": naive.updates,
        "shown": torch.allclose(shown.float(), plain(x.to(compute)).float(), rtol=1e-2, atol=1e-3),
        "same output": torch.equal(trained, again),
    }  # fmt: skip
    train(engine, 1, begin=5)
    result["done"] = engine.full_state_dict()
    engine.destroy()
    return result


@pytest.mark.parametrize(
    "options", [{"decay": 0.9}, {"decay": 0.99, "every": 2, "warmup": True}], ids=["plain", "slow"]
)
def test_it_is_that_of_a_plain_loop_and_every_bit_comes_back(ranks, options) -> None:
    setups = [Setup("fp32"), Setup("bf16", clip=1.0)]
    for found in ranks(follow, 2, setups, (0, 1, 2, 3), options):
        for seen in found:
            assert_identical(*seen["start"])
            assert_close(*seen["average"])
            assert_identical(*seen["back"])
            assert seen["shown"] and seen["same output"]
            assert seen["updates"] == seen["naive updates"] == (5 if options.get("every", 1) == 1 else 2)


def plain(setup, stage):
    engine = start(Mlp, setup.config(stage))
    train(engine, 6)
    state = engine.full_state_dict()
    engine.destroy()
    return state


def test_training_is_the_same_bits_with_it_and_without(ranks) -> None:
    setup = Setup("bf16")
    kept = ranks(follow, 2, [setup], (0, 3), {"decay": 0.5})[0]
    for seen, stage in zip(kept, (0, 3), strict=True):
        assert_identical(seen["done"], ranks(plain, 2, setup, stage)[0])


# -- a loop of one's own ----------------------------------------------------------------------------------------------


def in_place(stage, dtype):
    """``shard``, with a step that a GradScaler skips; the average is looked at between a backward and its step, too."""
    model = seeded(Mlp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    config = Setup(dtype).config(stage)
    engine = shardline.shard(model, optimizer, {"zero_optimization": config["zero_optimization"]})
    naive, ema = Naive(engine, 0.8), shardline.EMA(engine, 0.8)
    looked = []
    for step in range(4):
        x, y = batch(step)
        loss = F.mse_loss(model(x).float(), y)
        (loss * (float("inf") if step == 2 else 1.0)).backward()
        looked.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
        average = averaged(ema)
        looked.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            assert_identical(averaged(ema), average)
        naive.follow(engine)
    found = averaged(ema), naive.average, ema.updates, looked
    engine.destroy()
    return found


def test_it_follows_a_plain_loop_and_leaves_its_gradients(ranks) -> None:
    for stage in (0, 2, 3):
        for average, naive, updates, looked in ranks(in_place, 2, stage, "fp32"):
            assert_close(average, naive)
            assert updates == 3
            assert looked[::2] == pytest.approx(looked[1::2], nan_ok=True)


# -- what is trained changes ------------------------------------------------------------------------------------------


def freeze_and_unfreeze(stage):
    """The head joins late; the first block is frozen for a while, all of it for an evaluation, and stands still."""
    model = seeded(Mlp)
    model.head.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.blocks.parameters(), lr=1e-2, eps=1e-4)
    engine, optimizer, *_ = shardline.initialize(model=model, optimizer=optimizer, config=Setup().config(stage))
    naive, ema = Naive(engine, 0.8), shardline.EMA(engine, 0.8)
    train(engine, 2, naive.follow)
    model.blocks[0].requires_grad_(False)
    model.head.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 1e-2})
    train(engine, 2, lambda e: naive.follow(e, "blocks.0."), begin=2)
    frozen, weights = averaged(ema), engine.full_state_dict()
    held = {name: value.clone() for name, value in naive.average.items()}
    trained = [param for param in model.parameters() if param.requires_grad]
    model.requires_grad_(False)
    with torch.no_grad():
        engine(batch(9)[0])
    still = averaged(ema)
    for param in trained:
        param.requires_grad_(True)
    model.blocks[0].requires_grad_(True)
    train(engine, 2, naive.follow, begin=4)
    found = (frozen, held), (still, held), (averaged(ema), naive.average), weights
    engine.destroy()
    return found


def test_what_is_frozen_keeps_its_average(ranks) -> None:
    for stage in (0, 2, 3):
        for frozen, still, unfrozen, weights in ranks(freeze_and_unfreeze, 2, stage):
            for pair in (frozen, still, unfrozen):
                assert_close(*pair)
            assert not torch.equal(frozen[0]["blocks.0.up.weight"], weights["blocks.0.up.weight"])


# -- checkpoints ------------------------------------------------------------------------------------------------------


def save(setup, stage, folder):
    engine = start(Mlp, setup.config(stage))
    ema = shardline.EMA(engine, 0.9, warmup=True)
    train(engine, 3)
    engine.module.blocks[1].requires_grad_(False)
    train(engine, 1, begin=3)
    engine.save_checkpoint(folder, async_save=True)
    saved = averaged(ema)
    train(engine, 2, begin=4)
    done = averaged(ema)
    engine.destroy()
    return saved, done


def resume(setup, stage, folder, when):
    told = []
    config = setup.config(stage)
    if when == "by configuration":
        config |= {"checkpoint": {"dir": folder, "resume": "auto"}}
    model = seeded(Mlp)
    model.blocks[1].requires_grad_(False)
    engine = shardline.initialize(model=model, config=config)[0]
    engine.events.subscribe(lambda event: told.append(str(event)))
    ema = shardline.EMA(engine, 0.9, warmup=True) if when == "early" else None
    if when != "by configuration":
        engine.load_checkpoint(folder)
    if when == "never":
        train(engine, 1)
        found = (
            any("no shardline.EMA" in text for text in told),
            any(
                bucket.weights.average is not None for unit in engine.trainables.layout.units for bucket in unit.buckets
            ),
        )
        engine.destroy()
        return found
    ema = ema or shardline.EMA(engine, 0.9, warmup=True)
    updates, loaded = ema.updates, averaged(ema)
    train(engine, 2, begin=4)
    found = updates, loaded, averaged(ema)
    engine.destroy()
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_checkpoint_holds_it_at_any_stage_and_world(ranks, tmp_path, dtype) -> None:
    setup = Setup(dtype)
    saved, done = ranks(save, 2, setup, 3, str(tmp_path))[0]
    same = [(3, 2, "late"), (1, 2, "early"), (0, 2, "by configuration")]
    for stage, world, when in [*same, (2, 1, "late"), (3, 3, "early")]:
        for updates, loaded, after in ranks(resume, world, setup, stage, str(tmp_path), when):
            assert updates == 4
            assert_identical(loaded, saved)
            if world == 2 and stage == 3:
                assert_identical(after, done)
    for told, kept in ranks(resume, 2, setup, 3, str(tmp_path), "never"):
        assert told and not kept


def without(setup, folder, path):
    """A checkpoint that holds none, and one that is taken for its weights only."""
    engine = start(Mlp, setup.config(2))
    train(engine, 2)
    engine.save_checkpoint(path)
    ema = shardline.EMA(engine, 0.9)
    train(engine, 2)
    engine.load_checkpoint(path)
    found = [(averaged(ema), engine.full_state_dict(), ema.updates)]
    train(engine, 2)
    engine.load_checkpoint(folder, load_module_only=True)
    found.append((averaged(ema), engine.full_state_dict(), ema.updates))
    engine.destroy()
    return found


def test_without_one_in_the_checkpoint_it_begins_with_the_weights(ranks, tmp_path) -> None:
    setup = Setup()
    ranks(save, 2, setup, 3, str(tmp_path / "a"))
    for found in ranks(without, 2, setup, str(tmp_path / "a"), str(tmp_path / "b")):
        for average, weights, updates in found:
            assert_identical(average, weights)
            assert updates == 0


# -- what cannot be ---------------------------------------------------------------------------------------------------


def mistakes(stage, folder):
    engine = start(Mlp, Setup().config(stage))
    said = [attempt(shardline.EMA, engine, *args, **more) for args, more in
            [((1.5,), {}), (("0.9",), {}), ((), {"every": 0}), ((), {"every": True})]]  # fmt: skip
    ema = shardline.EMA(engine)
    said.append(attempt(shardline.EMA, engine))
    train(engine, 1)
    before, average = engine.full_state_dict(), averaged(ema)
    x, y = batch(1)

    def within(call):
        with ema.applied():
            call()

    def frozen():
        engine.module.head.requires_grad_(False)
        engine(x)

    for call in (
        lambda: within(lambda: None),
        lambda: engine.backward(F.mse_loss(engine(x), y)),
        engine.step,
        lambda: engine.save_checkpoint(folder),
        lambda: engine.load_checkpoint(folder),
        engine.destroy,
        ema.remove,
        frozen,
    ):
        said.append(attempt(within, call))
    engine.module.head.requires_grad_(True)
    with engine.gathered_parameters():
        said.append(attempt(averaged, ema))
    engine.zero_grad()
    unchanged = all(torch.equal(value, before[name]) for name, value in engine.full_state_dict().items())
    kept = all(torch.equal(value, average[name]) for name, value in averaged(ema).items())
    ema.remove()
    said.append(attempt(averaged, ema))
    shardline.EMA(engine, 0.5)
    train(engine, 1)
    engine.destroy()
    return said, unchanged and kept


def test_what_cannot_be_is_said_and_changes_nothing(ranks, tmp_path) -> None:
    for stage in (0, 3):
        for said, unchanged in ranks(mistakes, 2, stage, str(tmp_path)):
            for text, words in zip(
                said,
                ["from 0 to 1", "from 0 to 1", "1 or more", "1 or more", "an EMA already", *["ema.applied()"] * 10],
                strict=True,
            ):
                assert is_sentence(text, "UsageError", words), (text, words)
            assert unchanged


def differ():
    engine = start(Mlp, Setup().config(1))
    said = attempt(shardline.EMA, engine, 0.9 + 0.01 * dist.get_rank())
    engine.destroy()
    return said


def test_ranks_make_it_alike(ranks) -> None:
    for said in ranks(differ, 2):
        assert is_sentence(said, "DisagreementError", "decay of the EMA")
