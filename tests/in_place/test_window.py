"""One window lies between two steps, however a loop fills it; and a plain checkpoint file begins and ends a run."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import shardline
from tests.harness import seeded
from tests.in_place.loops import STAGES, assert_same, averaged, config, sharded
from tests.models import Mlp, regression


def batch(seed):
    return regression(4, seed=10 * seed + dist.get_rank())


def windows(shard):
    """Every step has another number of batches, and ``zero_grad`` stands somewhere else; the schedule is the loop's."""
    model = seeded(Mlp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    engine = shard(model, optimizer)
    seed, seen = 0, []
    for step, batches in enumerate((1, 3, 2, 1, 4)):
        if step % 3 == 0:
            optimizer.zero_grad()  # before the forward
        for number in range(batches):
            x, y = batch(seed := seed + 1)
            loss = F.mse_loss(model(x), y) / batches
            if step % 3 == 1 and number == 0:
                model.zero_grad()  # between forward and backward
            loss.backward(retain_graph=step == 2)
            if step == 2:
                loss.backward()  # a sum
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        for param in model.parameters():
            param.grad.nan_to_num_(nan=0.0)
            param.grad.mul_(0.5)  # what is done by hand counts
        optimizer.step()
        if step % 3 == 2:
            optimizer.zero_grad(set_to_none=True)  # after the step
        if step == 3:
            scheduler.step()  # once: nothing else steps it
        seen.append((float(norm), optimizer.param_groups[0]["lr"]))
        if step % 3 != 2:
            optimizer.zero_grad()
    weights = engine.full_state_dict()
    engine.destroy()
    return weights, seen


def windows_at(stage, **more):
    return windows(sharded(stage, **more))


@pytest.mark.parametrize("world", [1, 2])
def test_a_window_is_what_lies_between_two_steps(ranks, world):
    want = ranks(windows, world, averaged)
    assert [rate for _, rate in want[0][1]] == [1e-2, 1e-2, 1e-2, 5e-3, 5e-3]
    for stage in STAGES:
        assert_same(ranks(windows_at, world, stage), want)
    assert_same(ranks(windows_at, world, 1, gradient_accumulation_steps=3), want)  # which only saves traffic


def whole_gradients():
    """Where they are whole ``p.grad`` is their average; elsewhere a sentence says what to call."""
    found = []
    for stage in STAGES:
        model = seeded(Mlp)
        engine = shardline.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), config(stage))
        x, y = batch(1)
        F.mse_loss(model(x), y).backward()
        try:
            found.append(model.head.weight.grad.clone())
        except shardline.ShardlineError as error:
            found.append(str(error))
        engine.destroy()
    return found


def gradient_by_hand():
    model = seeded(Mlp)
    averaged(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = batch(1)
    F.mse_loss(model(x), y).backward()
    return model.head.weight.grad


def test_a_gradient_is_the_averaged_whole_or_a_sentence(ranks):
    for count in (1, 2):
        want = ranks(gradient_by_hand, count)[0]
        for found in ranks(whole_gradients, count):
            for each in found:
                if isinstance(each, str):
                    assert count > 1 and "engine.before_step(fn)" in each
                else:
                    assert_same(each, want)
            assert count > 1 or all(isinstance(each, torch.Tensor) for each in found)


def from_a_file(file, stage):
    """Begins with a plain file, and leaves one."""
    saved = torch.load(file, weights_only=True)
    model = Mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5.0)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    engine = shardline.shard(model, optimizer, config(stage))
    train(model, optimizer, 2)
    saved = {"model": engine.full_state_dict(), "optimizer": engine.full_optimizer_state_dict(rank0_only=True)}
    if dist.get_rank() == 0:
        torch.save(saved, f"{file}.{stage}")
    engine.destroy()


def train(model, optimizer, seed):
    for step in range(2):
        x, y = regression(4, seed=seed + step)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_plain_file_begins_and_ends_a_run(ranks, tmp_path):
    model, file = seeded(Mlp), str(tmp_path / "plain.pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    train(model, optimizer, 0)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 2)
    want = optimizer.state_dict()["state"]
    for world, stage in ((1, 2), (2, 0), (2, 3)):
        ranks(from_a_file, world, file, stage)
        back = torch.load(f"{file}.{stage}", weights_only=True)
        again = seeded(Mlp)
        again.load_state_dict(back["model"])
        assert_same(dict(again.state_dict()), dict(model.state_dict()))
        plain = torch.optim.AdamW(again.parameters(), lr=5.0)
        plain.load_state_dict(back["optimizer"])
        for number, state in plain.state_dict()["state"].items():
            assert_same({key: state[key] for key in want[number]}, want[number])
        assert plain.param_groups[0]["lr"] == 1e-2
