"""The five schedules against formulas written another way, and how they behave as torch schedulers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR

from shardline.errors import ConfigError
from shardline.optim import lr

STEPS = 10_000
BASES = (3e-4, 7e-3)


def two_groups(kind: type[Optimizer] = AdamW) -> Optimizer:
    return kind([{"params": [nn.Parameter(torch.ones(1))], "lr": base} for base in BASES])


def rates(scheduler: LRScheduler, steps: int) -> Iterator[list[float]]:
    """What the optimizer's groups hold at steps 1, 2, .., as the optimizer sees it when it steps."""
    for _ in range(steps):
        yield [group["lr"] for group in scheduler.optimizer.param_groups]
        scheduler.optimizer.step()
        scheduler.step()


def spread(value: Any) -> list[float]:
    return list(value) if isinstance(value, list) else [value, value]


# The formulas again. `done` is the number of optimizer steps applied so far; what is returned rules the next one.


def climbed(done: int, steps: int, shape: str) -> float:
    """The risen fraction of a warm-up of ``steps``."""
    steps = max(steps, 2)
    if done <= 1:
        return 0.0
    if done > steps:
        return 1.0
    return math.log(done, steps) if shape == "log" else float(Fraction(done - 1, steps))


def warmup(done: int, low: float, high: float, steps: int, shape: str) -> float:
    g = climbed(done, steps, shape)
    return (1 - g) * low + g * high


def warmup_decay(done: int, low: float, high: float, steps: int, shape: str, total: int) -> float:
    over = done - 1 - max(steps, 2)
    if over < 0:
        return warmup(done, low, high, steps, shape)
    length = total - max(steps, 2)
    left = float(Fraction(length - over, max(length, 1))) if over < length or length < 1 else 0.0
    return low + (high - low) * max(left, 0.0)


def warmup_cosine(done: int, base: float, first: float, steps: int, last: float, shape: str, total: int) -> float:
    if done == 0:
        return 0.0
    steps = max(steps, 2)
    if done <= steps:
        return base * (1 - (1 - first) * (1 - climbed(done, steps, shape)))
    progress = min(Fraction(1), Fraction(done - steps, max(total - steps, 1)))
    return base * (1 - (1 - last) * math.sin(math.pi * float(progress) / 2) ** 2)


def triangle(done: int, up: int, down: int, up_stairs: int, down_stairs: int) -> Fraction:
    place = Fraction(done % (up + down))
    if place <= up:
        height, stairs = place / up, up_stairs
    else:
        height, stairs = 1 - (place - up) / down, down_stairs
    return Fraction(math.floor(height * stairs), stairs) if stairs else height


def close(got: list[float], expected: list[float]) -> bool:
    return all(abs(one - other) <= 1e-12 * abs(other) + 1e-15 for one, other in zip(got, expected, strict=True))


def follows(made: lr.ClosedForm, expected: Callable[[int, int], float]) -> bool:
    """Whether the rates of both groups are ``expected(done, group)`` for 10,000 steps."""
    return all(close(made.lr(done - 1), [expected(done, 0), expected(done, 1)]) for done in range(STEPS))


@pytest.mark.parametrize("shape", ["log", "linear"])
@pytest.mark.parametrize(
    ("steps", "low", "high"),
    [
        (1, 0.0, None),
        (2, 1e-5, 1e-3),
        (3, [1e-5, 1e-4], [2e-3, 1e-2]),
        (1000, 1e-2, 1e-3),
        (1000, [0.0, 1e-6], None),
        (20_000, 0.0, 1e-3),
    ],
)
def test_warmup(shape: str, steps: int, low: Any, high: Any) -> None:
    made = lr.WarmupLR(two_groups(), low, high, steps, shape)
    lows, highs = spread(low), list(BASES) if high is None else spread(high)
    assert follows(made, lambda done, group: warmup(done, lows[group], highs[group], steps, shape))


@pytest.mark.parametrize("shape", ["log", "linear"])
@pytest.mark.parametrize(
    ("steps", "total", "low", "high"),
    [
        (1, 9_000, 0.0, 1e-3),
        (100, 3001, [1e-5, 1e-4], [2e-3, 1e-2]),
        (3000, 3001, 1e-6, None),
        (3000, 20_000, 1e-3, 1e-4),
        (3000, 2000, 0.0, 1e-3),
    ],
)
def test_warmup_decay(shape: str, steps: int, total: int, low: Any, high: Any) -> None:
    made = lr.WarmupDecayLR(two_groups(), total, low, high, steps, shape)
    lows, highs = spread(low), list(BASES) if high is None else spread(high)
    assert follows(made, lambda done, group: warmup_decay(done, lows[group], highs[group], steps, shape, total))


@pytest.mark.parametrize("shape", ["log", "linear"])
@pytest.mark.parametrize(
    ("steps", "total", "first", "last"),
    [
        (1, 9_000, 0.0, 1e-4),
        (100, 3001, 0.1, 0.0),
        (3000, 3001, 0.5, 0.2),
        (3000, 20_000, 0.0, 1.0),
        (50, 20, 0.1, 0.1),
    ],
)
def test_warmup_cosine(shape: str, steps: int, total: int, first: float, last: float) -> None:
    made = lr.WarmupCosineLR(two_groups(), total, first, steps, last, shape)
    assert follows(made, lambda done, group: warmup_cosine(done, BASES[group], first, steps, last, shape, total))


@pytest.mark.parametrize("decay", [(0.0, 0, 0.0), (0.1, 100, 1e-4), (2.0, 7, 0.0)])
@pytest.mark.parametrize(
    ("up", "down", "up_stairs", "down_stairs"),
    [
        (1, None, 0, None),
        (7, 3, 2, None),
        (2000, None, 0, None),
        (1500, 4000, 5, 0),
        (1500, 0, 5, None),
        (700, 1100, 0, 3),
        (49, 98, 49, 7),
        (9000, 9000, 2000, 1),
    ],
)
def test_one_cycle(up: int, down: int | None, up_stairs: int, down_stairs: int | None, decay: Any) -> None:
    lr_rate, size, mom_rate = decay
    lows, highs, least = [1e-4, 1e-3], [1e-2, 5e-1], [0.8, 0.7]
    made = lr.OneCycle(
        two_groups(),
        lows,
        highs,
        decay_lr_rate=lr_rate,
        cycle_first_step_size=up,
        cycle_second_step_size=down,
        cycle_first_stair_count=up_stairs,
        cycle_second_stair_count=down_stairs,
        decay_step_size=size,
        cycle_min_mom=least,
        cycle_max_mom=0.9,
        decay_mom_rate=mom_rate,
    )
    down = up if down is None else down
    down_stairs = up_stairs if down_stairs is None else down_stairs
    for done in range(STEPS):
        if done <= up + down:
            height = float(triangle(done, up, down, up_stairs, down_stairs))
            rate = [a * (1 - height) + b * height for a, b in zip(lows, highs, strict=True)]
            momenta = [0.9 * (1 - height) + a * height for a in least] if done else least
        else:
            after = float(Fraction(done - up - down, size)) if size else 0.0
            rate = [a / (1 + lr_rate * after) for a in lows]
            momenta = [min(0.9 + 0.9 * mom_rate * after, 1 - 1e-6)] * 2
        assert close(made.lr(done - 1), rate)
        assert close([beta for beta, _ in made.betas(done - 1)], momenta)
        assert {beta for _, beta in made.betas(done - 1)} == {0.99}


@pytest.mark.parametrize("staircase", [False, True])
@pytest.mark.parametrize("size, rate, low", [(1, 1.0, 1e-3), (2000, 5.0, [1e-5, 1e-4]), (300, 0.0, 1e-3)])
def test_range_test(staircase: bool, size: int, rate: float, low: Any) -> None:
    def expected(done: int, group: int) -> float:
        rises = Fraction(done - done % size if staircase else done, size)
        return spread(low)[group] + spread(low)[group] * rate * float(rises)

    assert follows(lr.LRRangeTest(two_groups(), low, size, rate, staircase), expected)


@pytest.mark.parametrize("name", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"])
def test_stepping_puts_the_closed_form_into_every_group(name: str) -> None:
    made = MAKERS[name](two_groups())
    assert isinstance(made, lr.ClosedForm)
    for done, got in enumerate(rates(made, 100)):
        assert got == made.lr(done - 1) == made.get_last_lr() == made.get_lr()
        if isinstance(made, lr.OneCycle):
            assert [group["betas"] for group in made.optimizer.param_groups] == made.betas(done - 1) == made.get_mom()


def test_the_first_two_steps_run_at_the_minimum() -> None:
    assert [one[0] for one in rates(lr.WarmupLR(two_groups(), 1e-6, 1e-3, 10), 3)] == [
        1e-6,
        1e-6,
        pytest.approx(1e-6 + (1e-3 - 1e-6) * math.log10(2), rel=1e-12),
    ]


def test_the_momentum_of_one_cycle_stays_below_one() -> None:
    made = lr.OneCycle(two_groups(), 1e-4, 1e-2, 0.0, 2, decay_step_size=1, decay_mom_rate=1.0)
    for _ in rates(made, 50):
        assert all(0.0 <= beta < 1.0 for group in made.optimizer.param_groups for beta in group["betas"])


def test_one_cycle_says_that_it_cannot_cycle_the_momentum(caplog: pytest.LogCaptureFixture) -> None:
    made = lr.OneCycle(two_groups(SGD), 1e-4, 1e-2)
    assert "SGD has no betas" in caplog.text
    assert made.get_mom() is None
    caplog.clear()
    lr.OneCycle(two_groups(SGD), 1e-4, 1e-2, cycle_momentum=False)
    assert not caplog.text


MAKERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "WarmupLR": lambda o: lr.WarmupLR(o, 0.0, None, 7),
    "WarmupDecayLR": lambda o: lr.WarmupDecayLR(o, 40, warmup_num_steps=7),
    "WarmupCosineLR": lambda o: lr.WarmupCosineLR(o, 40, warmup_num_steps=7),
    "OneCycle": lambda o: lr.OneCycle(o, 1e-4, 1e-2, cycle_first_step_size=9),
    "LRRangeTest": lambda o: lr.LRRangeTest(o, 1e-3, 7),
    "StepLR": lambda o: StepLR(o, 3),
}


@pytest.mark.parametrize("name", MAKERS)
def test_loading_goes_on_where_it_was_and_writes_the_rate(name: str) -> None:
    straight = MAKERS[name](two_groups())
    list(rates(straight, 20))
    state = json.loads(json.dumps(straight.state_dict()))

    resumed = MAKERS[name](two_groups())
    lr.restore(resumed, state)
    assert resumed.get_last_lr() == straight.get_last_lr()
    for mine, theirs in zip(resumed.optimizer.param_groups, straight.optimizer.param_groups, strict=True):
        assert mine["lr"] == theirs["lr"]
        if isinstance(resumed, lr.ClosedForm):
            assert mine["betas"] == theirs["betas"]
    assert list(rates(resumed, 30)) == list(rates(straight, 30))


@pytest.mark.parametrize("name", [one for one in MAKERS if one != "StepLR"])
def test_each_is_a_torch_scheduler_with_a_small_state(name: str) -> None:
    made = MAKERS[name](two_groups())
    assert isinstance(made, LRScheduler)
    assert made.state_dict() == {"last_epoch": 0}


def test_last_batch_iteration_starts_in_the_middle() -> None:
    straight = MAKERS["WarmupDecayLR"](two_groups())
    list(rates(straight, 12))
    middle = lr.WarmupDecayLR(two_groups(), 40, warmup_num_steps=7, last_batch_iteration=11)
    assert middle.get_last_lr() == straight.get_last_lr()


def test_a_rate_that_is_a_tensor_stays_that_tensor() -> None:
    rate = torch.tensor(1e-3)
    optimizer = AdamW([nn.Parameter(torch.ones(1))], lr=rate, capturable=False, foreach=False)
    made = lr.WarmupLR(optimizer, 0.0, None, 4, "linear")
    list(rates(made, 4))
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.75e-3)
    assert made.get_last_lr()[0] is not rate


def test_build_by_name() -> None:
    assert type(lr.build("WarmupLR", two_groups(), None)) is lr.WarmupLR
    assert type(lr.build("warmupcosinelr", two_groups(), {"total_num_steps": 1e4})) is lr.WarmupCosineLR
    assert type(lr.build("StepLR", two_groups(), {"step_size": 3})) is StepLR
    assert lr.VALID_LR_SCHEDULES == ["LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("WarmupRL", {}, "scheduler.type is 'WarmupRL'.* Did you mean 'WarmupLR'"),
        ("Optimizer", {}, "not a known schedule"),
        ("LRScheduler", {}, "not a known schedule"),
        ("ReduceLROnPlateau", {}, "needs a metric"),
        ("WarmupLR", {"warmup_steps": 3}, "no parameter 'warmup_steps'. Did you mean 'warmup_num_steps'"),
        ("WarmupDecayLR", {}, "needs the parameter 'total_num_steps'"),
        ("LambdaLR", {}, "needs the parameter 'lr_lambda'"),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 1.0, "mode": "x"}, "CyclicLR cannot be built .* mode is invalid"),
        ("WarmupLR", {"warmup_type": "cubic"}, "warmup_type is 'cubic'; it must be 'log' or 'linear'"),
        ("WarmupLR", {"warmup_num_steps": -1}, "warmup_num_steps is -1; it must be a whole number"),
        ("WarmupLR", {"warmup_num_steps": 2.5}, "warmup_num_steps is 2.5"),
        ("WarmupLR", {"warmup_num_steps": "auto"}, "warmup_num_steps is 'auto'"),
        ("WarmupLR", {"warmup_min_lr": -1e-3}, "warmup_min_lr is -0.001; it must be a finite number of at least 0"),
        ("WarmupLR", {"warmup_max_lr": float("nan")}, "warmup_max_lr is nan"),
        ("WarmupLR", {"warmup_max_lr": [1e-3] * 3}, "warmup_max_lr lists 3 values and the optimizer has 2 param"),
        ("WarmupLR", {"warmup_max_lr": [1e-3, True]}, r"warmup_max_lr\[1\] is True"),
        ("OneCycle", {"cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_first_step_size": 0}, "first_step_size is 0"),
        ("OneCycle", {"cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_max_mom": 1.0}, "at least 0 and below 1"),
        ("LRRangeTest", {"lr_range_test_step_size": 0}, "step_size is 0; it must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_built_says_why_and_leaves_the_rates(name: str, params: dict[str, Any], message: str) -> None:
    optimizer = two_groups()
    with pytest.raises(ConfigError, match=message):
        lr.build(name, optimizer, params)
    if name != "CyclicLR":
        assert [group["lr"] for group in optimizer.param_groups] == list(BASES)


def test_a_run_shorter_than_its_warm_up_is_told(caplog: pytest.LogCaptureFixture) -> None:
    lr.WarmupCosineLR(two_groups(), 10, warmup_num_steps=11)
    assert "the run ends before the warm-up does" in caplog.text


# --- steps that are taken back ----------------------------------------------------------------------------------------

UNDONE: dict[str, Callable[[Optimizer], Any]] = {
    "OneCycle": lambda optimizer: lr.OneCycle(optimizer, 1e-3, 1e-2, cycle_first_step_size=3, decay_step_size=1),
    "WarmupDecayLR": lambda optimizer: lr.WarmupDecayLR(optimizer, total_num_steps=7, warmup_num_steps=3),
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=30),
    "MultiStepLR": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5]),
    "CosineAnnealingWarmRestarts": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
    "SequentialLR": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer, [StepLR(optimizer, 2), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)], milestones=[4]
    ),
    "ChainedScheduler": lambda optimizer: torch.optim.lr_scheduler.ChainedScheduler(
        [StepLR(optimizer, 2), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)], optimizer
    ),
}


def all_of(optimizer: Optimizer, scheduler: Any) -> str:
    groups = [{key: one for key, one in group.items() if key != "params"} for group in optimizer.param_groups]
    return repr((groups, scheduler.state_dict()))


@pytest.mark.parametrize("name", UNDONE)
@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
def test_a_step_that_is_taken_back_leaves_nothing(name: str, tensors: bool) -> None:
    """At every place of the schedule; a run with steps that were undone is the run without them."""
    found = []
    for undone in (False, True):
        optimizer = two_groups()
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"]) if tensors else group["lr"]
        scheduler, seen = UNDONE[name](optimizer), []
        for _ in range(9):
            optimizer.step()
            if undone:
                before, rate = all_of(optimizer, scheduler), optimizer.param_groups[0]["lr"]
                undo = lr.step(scheduler, optimizer, {})
                assert all_of(optimizer, scheduler) != before
                assert undo() is True and all_of(optimizer, scheduler) == before
                assert not tensors or optimizer.param_groups[0]["lr"] is rate, "the tensor stays"
            scheduler.step()
            seen.append(all_of(optimizer, scheduler))
        found.append(seen)
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", [lr.OneCycle, StepLR])
def test_what_the_loop_set_since_stays(kind: Any) -> None:
    optimizer = two_groups()
    scheduler = StepLR(optimizer, 1) if kind is StepLR else lr.OneCycle(optimizer, 1e-3, 1e-2, cycle_first_step_size=3)
    optimizer.step()
    first, second = (group["lr"] for group in optimizer.param_groups)
    undo = lr.step(scheduler, optimizer, {})
    optimizer.param_groups[0]["lr"] = 0.125
    assert undo() and [group["lr"] for group in optimizer.param_groups] == [0.125, second] and first != 0.125
    undo = lr.step(scheduler, optimizer, {})
    scheduler.step()
    moved = all_of(optimizer, scheduler)
    assert undo() is False and all_of(optimizer, scheduler) == moved
