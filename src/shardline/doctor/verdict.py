"""A check: what ranks measure, and the verdict on what all of them found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["FAILED", "OK", "SLOW", "Check", "Verdict", "judge_clocks", "judge_speed", "judge_training", "worst"]

OK, SLOW, FAILED = "ok", "slow", "failed"
_RANKING = (OK, SLOW, FAILED)

_SKEW = 2.0
"""Seconds by which clocks may differ."""

_LEAST = {"shared memory": 0.3e9, "gloo": 0.05e9, "gloo, through host memory": 0.05e9, "nccl": 2e9}
"""Bytes per second, by way of transport, below which a gather or a reduction is called slow."""
_LONGEST = 0.02
"""Seconds that a small message may take."""
_TOLERANCE = 1e-5
"""Relative difference between stages on accelerators, whose libraries add in an order of their own."""


@dataclass(frozen=True)
class Verdict:
    """What is known of one thing: ``state`` is ``"ok"``, ``"slow"`` or ``"failed"``, ``text`` says what was found."""

    state: str
    text: str

    def __str__(self) -> str:
        return f"{self.state}: {self.text}"


@dataclass(frozen=True)
class Check:
    """One line of the examination.

    Attributes:
        what: is checked.
        measure: runs on every rank, collectively; returns a value of JSON.
        judge: makes the verdict of the values of all ranks, in their order, and those of earlier checks by name.
        arguments: of ``measure``.
        alone: needs no other rank: where there are none yet, the process that starts them measures.
    """

    what: str
    measure: Callable[..., Any]
    judge: Callable[[Sequence[Any], dict[str, Any]], Verdict]
    arguments: tuple[Any, ...] = ()
    alone: bool = False


def worst(values: Sequence[Any], earlier: dict[str, Any]) -> Verdict:
    """The worst of the ranks' (state, text)."""
    rank = max(range(len(values)), key=lambda rank: _RANKING.index(values[rank][0]))
    state, text = values[rank]
    alike = all(value == values[0] for value in values)
    return Verdict(state, text if alike or state == OK else f"rank {rank}: {text}")


def judge_clocks(values: Sequence[Any], earlier: dict[str, Any]) -> Verdict:
    """Of every rank's times, each read as soon as all ranks had met: the smallest spread is the clocks' own."""
    rounds = list(zip(*values, strict=True))
    skew = min(max(times) - min(times) for times in rounds)
    if skew <= _SKEW:
        return Verdict(OK, f"ranks differ by {skew * 1e3:.3g} ms or less")
    times = min(rounds, key=lambda each: max(each) - min(each))
    ahead, behind = times.index(max(times)), times.index(min(times))
    return Verdict(
        FAILED,
        f"the clock of rank {ahead} is {skew:.1f} s ahead of that of rank {behind}, so times of logs and files cannot "
        f"be compared. Run chrony or ntpd on every host.",
    )


def judge_speed(values: Sequence[Any], earlier: dict[str, Any]) -> Verdict:
    """Of every rank's [way, {collective: [right, seconds, bytes]}]; the slowest rank counts."""
    way = values[0][0]
    if len(values) == 1:
        return Verdict(OK, "a single rank exchanges nothing")
    wrong = [(rank, name) for rank, (_, found) in enumerate(values) for name in found if not found[name][0]]
    if wrong:
        rank, name = wrong[0]
        return Verdict(FAILED, f"rank {rank} got wrong numbers from a {name} ({way}). Do not train on this machine.")
    said, slow = [], []
    for name in values[0][1]:
        seconds, size = max(found[name][1] for _, found in values), values[0][1][name][2]
        is_slow = size / seconds < _LEAST.get(way, 0.0) if size else seconds > _LONGEST
        said.append(f"{name} {size / seconds / 1e9:.2g} GB/s" if size else f"{name} {seconds * 1e6:.0f} us")
        slow += [name] * is_slow
    text = f"{way}: {', '.join(said)}"
    if slow:
        return Verdict(SLOW, f"{text}. Slow: {', '.join(slow)}; are the cores or the network busy with other work?")
    return Verdict(OK, text)


def judge_training(stage: int) -> Callable[[Sequence[Any], dict[str, Any]], Verdict]:
    """Of every rank's [type of device, weights]: they are the same on all ranks and as at stage 0."""

    def judge(values: Sequence[Any], earlier: dict[str, Any]) -> Verdict:
        kind, weights = values[0]
        if not all(abs(each) < 1e6 for each in weights):
            return Verdict(FAILED, f"weights are not finite after three steps at stage {stage}.")
        for rank, (_, other) in enumerate(values):
            if other != weights:
                return Verdict(FAILED, f"ranks 0 and {rank} have different weights after three steps at stage {stage}.")
        first = earlier.get("training at stage 0")
        if not stage or not first:
            return Verdict(OK, "the same weights on all ranks")
        if weights == first[0][1]:
            return Verdict(OK, "bit for bit the weights of stage 0")
        far = max(abs(one - other) / max(1.0, abs(other)) for one, other in zip(weights, first[0][1], strict=True))
        if kind == "cpu" or far > _TOLERANCE:
            return Verdict(FAILED, f"the weights of stage {stage} differ from those of stage 0 by up to {far:.2g}.")
        return Verdict(OK, f"the weights of stage 0, to {far:.1g}")

    return judge
