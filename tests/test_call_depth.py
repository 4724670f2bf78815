"""How many calls of our own lie between what the user calls and a collective."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch.distributed as dist

import shardline
from tests.harness import Setup, start
from tests.models import Mlp, mse, regression

PACKAGE = str(Path(shardline.__file__).parent)
MOST = 6
"""One each: engine, hook, schedule, unit, flat buffer, transport.

Where ranks of one host read each other's memory there is no collective: a transport executes whatever is due.
"""


def our_calls() -> list[str]:
    """Functions of the package on the stack, the outermost first."""
    found = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        # What runs a case on a rank is not part of a step.
        if code.co_filename.startswith(PACKAGE) and Path(code.co_filename).stem != "testing":
            found.append(f"{Path(code.co_filename).stem}.{code.co_name}")
        frame = frame.f_back
    return found[::-1]


def deepest(config: dict[str, Any]) -> dict[tuple[str, str], list[str]]:
    """The longest way to each collective of torch's, by what the user called, once orders are agreed on."""
    engine, phase = start(Mlp, config), ""
    found: dict[tuple[str, str], list[str]] = {}

    def watched(name: str) -> Any:
        collective = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls = our_calls()
            if phase and len(calls) > len(found.get((phase, name), ())):
                found[phase, name] = calls
            return collective(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("broadcast", "all_to_all_single"):  # what gathers and reductions over gloo are made of
            patch.setattr(dist, name, watched(name))
        for step in range(3):
            agreed = step == 2
            phase = "forward" if agreed else ""
            loss = mse(engine, engine.module, regression(step))
            phase = "backward" if agreed else ""
            engine.backward(loss)
            phase = ""
            engine.step()
    engine.destroy()
    return found


def both_ways(ways: list[dict[str, Any]]) -> list[dict[tuple[str, str], list[str]]]:
    return [deepest(each) for each in ways]


def test_few_calls_lie_between_the_user_and_a_collective(ranks) -> None:
    ways = [
        {**Setup(zero=zero).config(3), "communication_transport": "gloo"}
        for zero in ({}, {"stage3_prefetch_bucket_size": 0})
    ]
    for rank_results in ranks(both_ways, 2, ways):
        for found in rank_results:
            assert set(found) == {
                ("forward", "broadcast"), ("backward", "broadcast"), ("backward", "all_to_all_single")
            }  # fmt: skip
            for what, calls in found.items():
                assert len(calls) <= MOST, f"{what}: {' > '.join(calls)}"
