"""Options of param groups go to the parameters that had them, whatever the order of the groups."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import shardline
from shardline.errors import CheckpointError

NAMES = ("0.weight", "1.weight", "2.weight", "3.weight")
FIRST = [(["0.weight", "1.weight"], 0.1, 0.0), (["2.weight"], 0.02, 0.3), (["3.weight"], 0.003, 0.1)]
TURNED = [FIRST[2], FIRST[0], FIRST[1]]
CONFIG = {"train_batch_size": 4, "zero_optimization": {"stage": 2, "unit_min_numel": 1}}


def model():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))


def optimizer_of(net, groups, configured=None):
    params = dict(net.named_parameters())
    return torch.optim.AdamW(
        [
            {"params": [params[name] for name in names], "lr": configured or lr, "weight_decay": configured or decay}
            for names, lr, decay in groups
        ]
    )


def schedule(name, optimizer):
    if name is None:
        return None
    return {
        "lambda": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        "sequence": lambda: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [torch.optim.lr_scheduler.LinearLR(optimizer), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)],
            [3],
        ),
    }[name]()


def batch(step):
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(step))


def plainly(name, steps):
    """The weights by plain torch, without any interruption."""
    net = model()
    optimizer = optimizer_of(net, FIRST)
    after = schedule(name, optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        net(batch(step)).square().mean().backward()
        optimizer.step()
        if after is not None:
            after.step()
    return {key: value.detach().clone() for key, value in net.named_parameters()}


def run(groups, name, steps, path, load, configured=None, freeze=(), **options):
    net = model()
    optimizer = optimizer_of(net, groups, configured)
    after = schedule(name, optimizer)
    built, optimizer, _, _ = shardline.initialize(model=net, optimizer=optimizer, lr_scheduler=after, config=CONFIG)
    for each in freeze:
        net.get_parameter(each).requires_grad_(False)
    said = []
    built.events.subscribe(lambda event: said.append(getattr(event, "message", "")))
    if load:
        built.load_checkpoint(path, **options)
    rank, world = built.comm.data.rank, built.comm.data.size
    while built.global_steps < steps:
        mine = batch(built.global_steps).chunk(world)[rank]
        built.backward(built(mine).square().mean())
        built.step()
    if not load:
        built.save_checkpoint(path)
    result = (
        built.full_state_dict(),
        [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups],
        said,
    )
    built.destroy()
    return result


def many(path):
    """All schedules in one set of processes: save, then resume with the groups in another order."""
    found = {}
    for name in (None, "lambda", "cosine", "sequence"):
        for which, groups in (("same", FIRST), ("turned", TURNED)):
            run(FIRST, name, 2, f"{path}/{name}{which}", False)
            found[str(name), which] = run(groups, name, 5, f"{path}/{name}{which}", True, 0.5)
    return found


def test_groups_in_another_order(ranks, tmp_path):
    """The resumed run is the straight one of plain torch, in the same order of groups and in another."""
    for found in ranks(many, 2, str(tmp_path)):
        for name in (None, "lambda", "cosine", "sequence"):
            wanted = plainly(name, 5)
            same, options, _ = found[str(name), "same"]
            turned, moved, said = found[str(name), "turned"]
            assert moved == [options[2], options[0], options[1]], name
            assert not [text for text in said if "param group" in text]
            for key, value in wanted.items():
                torch.testing.assert_close(same[key], value, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(turned[key], value, rtol=1e-5, atol=1e-6)


def partly(path):
    """Groups that are split, merged, added, removed or frozen; what was said, and the options after the load."""
    run(FIRST, None, 2, path, False)
    cases = {
        "split": [(["0.weight"], 0, 0), (["1.weight"], 0, 0), (["2.weight"], 0, 0), (["3.weight"], 0, 0)],
        "merged": [(["0.weight", "2.weight"], 0, 0), (["1.weight"], 0, 0), (["3.weight"], 0, 0)],
        "moved": [(["0.weight"], 0, 0), (["1.weight", "2.weight", "3.weight"], 0, 0)],
    }
    found = {name: run(groups, None, 2, path, True, 0.5)[1:] for name, groups in cases.items()}
    found["frozen"] = run(TURNED, None, 2, path, True, 0.5, freeze=["3.weight"])[1:]
    alike = copy.deepcopy(FIRST)
    alike[1] = (["2.weight"], 0.1, 0.0)
    run(alike, None, 2, path + "/alike", False)
    found["alike"] = run(cases["merged"], None, 2, path + "/alike", True, 0.5)[1:]
    return found


def test_groups_that_are_others(ranks, tmp_path):
    found = ranks(partly, 1, str(tmp_path))[0]
    a, b, c = (0.1, 0.0), (0.02, 0.3), (0.003, 0.1)
    ours = (0.5, 0.5)
    assert found["split"][0] == [a, a, b, c]
    assert found["merged"][0] == [ours, a, c]
    assert found["moved"][0] == [a, ours]
    assert found["frozen"][0] == [c, a, b]
    assert found["alike"][0] == [a, a, c]
    for name in ("split", "frozen", "alike"):
        assert not [text for text in found[name][1] if "param group" in text], name
    (said,) = [text for text in found["merged"][1] if "param group" in text]
    assert (
        "param group 0 has parameters that were in group 0 ('0.weight') and group 1 ('2.weight') of the checkpoint, "
        "whose options differ in 'lr', 'weight_decay': its options stay as configured"
    ) in said
    assert "group 0 ('1.weight') and group 1 ('2.weight') and group 2" in found["moved"][1][-1]


def hostile(path):
    """A manifest whose options are none of this optimizer, with a right checksum."""
    from tests.checkpoint.test_forms import content, sign

    run(FIRST, "cosine", 2, path, False)
    from pathlib import Path

    where = Path(path, "global_step2")
    good = content(where)
    said = []

    def load(data):
        sign(where, data)
        try:
            run(FIRST, "cosine", 3, path, True)
            said.append(None)
        except CheckpointError as error:
            said.append(str(error))

    for key, value in (("lr", "fast"), ("betas", 3), ("params", [1]), ("fused", "x"), ("amsgrad", 7)):
        data = copy.deepcopy(good)
        data["optimizer"]["groups"][0][key] = value
        load(data)
    wrong = {"step": [3], "last_epoch": ["x"], "base_lrs": [[1.0], ["x", 1, 1]], "eta_min": [[]]}
    for key, value in [(key, value) for key, values in wrong.items() for value in values]:
        data = copy.deepcopy(good)
        data["scheduler"][key] = value
        load(data)
    return said


def test_options_that_are_none(ranks, tmp_path):
    said = ranks(hostile, 1, str(tmp_path))[0]
    lr, betas, params, fused, amsgrad, step, epoch, count, kind, minimum = said
    assert "'fast' for the option 'lr' of param group 0" in lr and "'betas'" in betas and "'amsgrad'" in amsgrad
    assert params is None and fused is None and step is None
    assert "'x' for 'last_epoch' of the scheduler" in epoch and "1 values for 'base_lrs'" in count
    assert "['x', 1, 1] for 'base_lrs'" in kind and "'eta_min'" in minimum


def test_another_number_of_groups_is_not_a_reason_to_forget_the_schedule(ranks, tmp_path):
    assert ranks(split, 1, str(tmp_path)) == [(2, pytest.approx([0.1 * 0.81, 0.1 * 0.81, 0.02 * 0.81, 0.003 * 0.81]))]


def split(path):
    run(FIRST, "lambda", 2, path, False)
    groups = [([name], 0, 0) for name in NAMES]
    net = model()
    optimizer = optimizer_of(net, groups, 0.5)
    after = schedule("lambda", optimizer)
    built, optimizer, _, _ = shardline.initialize(model=net, optimizer=optimizer, lr_scheduler=after, config=CONFIG)
    built.load_checkpoint(path)
    result = after.last_epoch, built.get_lr()
    built.destroy()
    return result
