"""Steps on a device are told, counted and scheduled as on a CPU, which knows at once whether they were applied."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness import Setup
from tests.spec.test_late_verdict import follow, make_plan


def follow_all(schedules: list[str], config: dict[str, Any], folder: str) -> list[dict[str, Any]]:
    return [
        follow(make_plan(seed), config, schedule, f"{folder}/{schedule}") for seed, schedule in enumerate(schedules)
    ]


@pytest.mark.parametrize(("world", "stage"), [(1, 2), (2, 3)])
def test_skipped_steps_are_those_of_a_cpu(ranks: Any, cpu_ranks: Any, tmp_path: Any, world: int, stage: int) -> None:
    schedules, config = ["OneCycle", "WarmupDecayLR", "LambdaLR"], Setup(accumulation=2).config(stage)
    found = ranks(follow_all, world, schedules, config, str(tmp_path / "device"))
    expected = cpu_ranks(follow_all, world, schedules, config, str(tmp_path / "cpu"))
    for runs, cpu_runs in zip(found, expected, strict=True):
        for run, cpu in zip(runs, cpu_runs, strict=True):
            assert run["rates"] == cpu["rates"]
            assert [event[:2] for event in run["told"]] == [event[:2] for event in cpu["told"]]
            assert [event[3] for event in run["told"] if len(event) > 3] == [
                event[3] for event in cpu["told"] if len(event) > 3
            ]
            assert [answer[:-1] for answer in run["answers"]] == [answer[:-1] for answer in cpu["answers"]]
            assert [save[:3] for save in run["saved"]] == [save[:3] for save in cpu["saved"]]
