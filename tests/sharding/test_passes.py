"""Ranks on any paths issue the same collectives in the same order, never deadlock, and lose no gradient.

Ranks are threads of one process here, units write down what they are asked, and a wire stands in for collectives: it
sees at once when ranks meet with different ones, and when all of them wait.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from shardline.errors import DisagreementError
from shardline.sharding.schedule import Schedule
from shardline.sharding.unit import Residence


class Stuck(Exception):
    """All ranks wait, or two met with different collectives."""


class Gone(Exception):
    """Another rank has ended by an error."""


class Wire:
    """Collectives between threads, in order on each channel."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.waiting, self.ended, self.failed = ranks, 0, 0, ""
        self.sent: dict[str, list[list[tuple[Any, Any]]]] = {}
        self.changed = threading.Condition()

    def post(self, channel: str, rank: int, key: Any, value: Any = None) -> int:
        with self.changed:
            lists = self.sent.setdefault(channel, [[] for _ in range(self.ranks)])
            number = len(lists[rank])
            lists[rank].append((key, value))
            for other, theirs in enumerate(lists):
                if len(theirs) > number and theirs[number][0] != key:
                    self.failed = f"{channel} {number}: rank {rank} {key}, rank {other} {theirs[number][0]}"
            self.changed.notify_all()
            return number

    def over(self, channel: str, number: int) -> bool:
        return all(len(each) > number for each in self.sent[channel])

    def wait(self, channel: str, number: int) -> list[Any]:
        """Every rank's value."""
        with self.changed:
            self.waiting += 1
            while not self.over(channel, number) and not self.failed:
                if self.waiting + self.ended == self.ranks and not self._somebody_can():
                    self.failed = "all ranks wait"
                    self.changed.notify_all()
                    break
                self._marks[threading.get_ident()] = (channel, number)
                self.changed.wait()
            self._marks.pop(threading.get_ident(), None)
            self.waiting -= 1
            if self.failed:
                raise Gone if self.failed == "gone" else Stuck(self.failed)
            return [each[number][1] for each in self.sent[channel]]

    _marks: dict[int, tuple[str, int]]

    def _somebody_can(self) -> bool:
        return any(self.over(*mark) for mark in self._marks.values())


class FakeUnit:
    """A unit of one rank. Its gradients are numbers: what was summed over all ranks is in ``total``."""

    is_local, sharded, pinned = False, True, False
    on_convert: Any = None

    def __init__(self, rank: int, index: int, wire: Wire, numel: int, arrived: bool) -> None:
        self.rank, self.index, self.wire, self.name = rank, index, wire, f"b{index}"
        self.plan = SimpleNamespace(numel=numel)
        self.trainable = [object()]
        self.holds = self.grad = self.partial = self.total = 0
        self.residence, self.arrived = Residence.SHARDED, arrived
        self.works: list[int] = []
        self.reductions: list[int] = []

    def hold(self) -> None:
        self.holds += 1

    def unhold(self) -> None:
        self.holds -= 1

    def unshard(self) -> None:
        if self.residence is Residence.SHARDED:
            self.works.append(self.wire.post("gather", self.rank, self.index))
            self.residence = Residence.GATHERING

    def wait_for_unshard(self) -> None:
        self.unshard()
        while self.works:
            self.wire.wait("gather", self.works.pop())
        self.residence = Residence.GATHERED

    def join_unshard(self) -> None:
        self.wire.wait("gather", self.wire.post("gather", self.rank, self.index))

    def reshard(self) -> None:
        if not self.holds and self.residence is not Residence.SHARDED:
            while self.works:
                self.wire.wait("gather", self.works.pop())
            self.residence = Residence.SHARDED

    def seal_keeping_buffer(self) -> None:
        if not self.holds and self.residence is Residence.GATHERED:
            self.residence = Residence.GATHERED_SEALED

    def has_uncollected(self) -> bool:
        return self.grad > 0

    def accumulate(self, factor: float) -> None:
        self.partial, self.grad = self.partial + self.grad, 0

    def reduce_scatter(self, factor: float) -> None:
        self.accumulate(factor)
        self.reductions.append(self.wire.post("reduce", self.rank, self.index, self.partial))
        self.partial = 0

    def has_reduced(self) -> bool:
        with self.wire.changed:
            return self.arrived or all(self.wire.over("reduce", number) for number in self.reductions)

    def wait_for_reduce(self) -> None:
        while self.reductions:
            self.total += sum(self.wire.wait("reduce", self.reductions.pop(0)))


@dataclass
class Way:
    """How all ranks run."""

    sizes: list[int]
    prefetch: bool = True
    reshard: bool = True
    max_live: int = 10**9
    arrived: bool = False
    backwards: int = 1  # in a step
    forwards: int = 1  # before a backward


Paths = list[list[list[list[int]]]]
"""Indexed [step][pass][rank]: units used, in order. The passes of a step are all forwards, and an evaluation."""


@dataclass
class Rank:
    """One rank's program: forwards along its paths, backwards along the reverse, a step."""

    rank: int
    wire: Wire
    way: Way
    units: list[FakeUnit] = field(default_factory=list)
    gathers: list[int] = field(default_factory=list)  # per step
    asked: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        way = self.way
        self.units = [FakeUnit(self.rank, i, self.wire, size, way.arrived) for i, size in enumerate(way.sizes)]
        self.questions = 0
        self.schedule = Schedule(
            self.units,  # type: ignore[arg-type]
            self.ask,
            prefetch=way.prefetch,
            reshard_after_forward=way.reshard,
            max_live=way.max_live,
            on_host=not way.arrived,
        )

    def ask(self, row: Any) -> list[list[int]]:
        self.questions += 1
        return self.share("ask", list(row))

    def share(self, channel: str, value: Any) -> list[Any]:
        return self.wire.wait(channel, self.wire.post(channel, self.rank, channel, value))

    def forward(self, path: list[int], grad: bool = True) -> None:
        schedule = self.schedule
        schedule.begin_forward(with_grad=grad)
        try:
            for index in path:
                unit = self.units[index]
                schedule.pre_forward(unit)  # type: ignore[arg-type]
                assert unit.residence is Residence.GATHERED
                if grad:
                    schedule.expect_backward(unit, 1)  # type: ignore[arg-type]
                schedule.post_forward(unit)  # type: ignore[arg-type]
        finally:
            schedule.end_forward()

    def backward(self, path: list[int]) -> None:
        schedule = self.schedule
        schedule.begin_backward(reducing=True, factor=1.0)
        for index in reversed(path):
            unit = self.units[index]
            schedule.pre_backward(unit)  # type: ignore[arg-type]
            assert unit.residence is Residence.GATHERED
            unit.grad += 1
            schedule.post_backward(unit, at_once=True)  # type: ignore[arg-type]
        schedule.end_backward()
        assert all(unit.residence is Residence.SHARDED for unit in self.units)

    def step(self) -> None:
        """As the boundary does, with a verdict that is read at once."""
        left = self.schedule.end_step()
        late = [unit.index for unit in self.units if unit.partial]
        rows = self.share("row", (left, late, sorted(self.schedule.wrong_hints)))
        everywhere = sorted({index for _, indices, _ in rows for index in indices})
        self.schedule.reduce_now(self.units[index] for index in everywhere)  # type: ignore[misc]
        if everywhere or any(left for left, _, _ in rows):
            self.schedule.negotiate_next({index for _, _, indices in rows for index in indices})

    def run(self, paths: Paths) -> None:
        for step in paths:
            before, asked = len(self.wire.sent.get("gather", [[]] * 9)[self.rank]), self.questions
            *training, evaluation = step
            for turn in range(self.way.backwards):
                used: list[int] = []
                for each in training[turn * self.way.forwards : (turn + 1) * self.way.forwards]:
                    self.forward(each[self.rank])
                    used += each[self.rank]
                self.backward(used)
            self.forward(evaluation[self.rank], grad=False)
            self.step()
            self.gathers.append(len(self.wire.sent.get("gather", [[]] * 9)[self.rank]) - before)
            self.asked.append(self.questions - asked)


def run(paths: Paths, way: Way, ranks: int) -> list[Rank]:
    """Run all ranks to their end; the first error of any, if it is not a refusal of ours, is raised."""
    wire = Wire(ranks)
    wire._marks = {}
    world = [Rank(rank, wire, way) for rank in range(ranks)]
    errors: list[BaseException] = []

    def body(rank: Rank) -> None:
        try:
            rank.run(paths)
        except Gone:
            pass
        except BaseException as error:
            errors.append(error)
            with wire.changed:
                wire.failed = wire.failed or ("gone" if isinstance(error, DisagreementError) else repr(error))
        finally:
            with wire.changed:
                wire.ended += 1
                wire.changed.notify_all()

    threads = [threading.Thread(target=body, args=(rank,)) for rank in world]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
    for index in range(len(way.sizes)):
        count = Counter(index for step in paths for each in step[:-1] for path in each for index in path)[index]
        for rank in world:
            rank.units[index].wait_for_reduce()
            assert rank.units[index].total == count, f"unit {index} on rank {rank.rank}"
    return world


def drawn(rng: random.Random, *, repeats: bool) -> tuple[Paths, Way, int]:
    """Random paths: in some steps all ranks take one, in some each its own; skips, other orders, repeats."""
    ranks, count = rng.choice([2, 3]), rng.randint(1, 6)
    sizes = [rng.choice([30, 100]) for _ in range(count)]
    way = Way(
        sizes,
        prefetch=rng.random() < 0.7,
        reshard=rng.random() < 0.8,
        max_live=10**9,
        arrived=rng.random() < 0.5,
        backwards=rng.choice([1, 1, 2]),
        forwards=rng.choice([1, 1, 2]),
    )

    def path() -> list[int]:
        found = [index for index in range(count) if rng.random() < 0.8]
        if rng.random() < 0.3:
            rng.shuffle(found)
        if repeats and found and rng.random() < 0.4:
            found.insert(rng.randint(0, len(found)), rng.choice(found))
        return found

    common = [path() for _ in range(2)]
    paths: Paths = []
    alike = rng.random()
    for _ in range(rng.randint(3, 8)):
        step = []
        for _ in range(way.backwards * way.forwards + 1):
            same = rng.choice(common)
            step.append([same if rng.random() < alike else path() for _ in range(ranks)])
        paths.append(step)
    return paths, way, ranks


@pytest.mark.parametrize("seed", range(20))
def test_any_paths_without_repeats(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(15):
        paths, way, ranks = drawn(rng, repeats=False)
        try:
            run(paths, way, ranks)
        except BaseException as error:
            raise AssertionError(f"{way}, {ranks} ranks: {paths}") from error


@pytest.mark.parametrize("seed", range(20))
def test_any_paths_with_repeats_or_little_room(seed: int) -> None:
    """A surprise may be refused in words; nothing else may happen."""
    rng = random.Random(100 + seed)
    refused = 0
    for _ in range(15):
        paths, way, ranks = drawn(rng, repeats=rng.random() < 0.7)
        way.max_live = rng.choice([0, 100, 10**9])
        try:
            run(paths, way, ranks)
        except DisagreementError:
            refused += 1
        except BaseException as error:
            raise AssertionError(f"{way}, {ranks} ranks: {paths}") from error
    assert refused < 10
