"""The targets as data, and the functions that compare measured figures with them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

EVERY = ("gpt", "deep", "wide", "conv")
BOTH = ("fp32", "bf16")


@dataclass(frozen=True)
class Rule:
    """One target: a ratio of Shardline to the best of some engines, and the most it may be.

    Attributes:
        what: in words.
        quantity: ``step`` (median of paired ratios), ``peak`` (memory), or ``set-up`` (median of paired ratios).
        stages: stages of Shardline.
        against: names of engines, ``{stage}`` filled in; ``limit`` is formula + activations.
        limit: with the best transport.
        gloo: over gloo alone; ``None`` where there is no target.
        slack: bytes by which ours may be larger although the ratio is above the limit.
    """

    what: str
    quantity: str
    stages: tuple[int, ...]
    against: tuple[str, ...]
    limit: float
    gloo: float | None
    dtypes: tuple[str, ...] = BOTH
    models: tuple[str, ...] = ("gpt",)
    accumulation: int = 1
    world: int = 2
    slack: float = 0.0


TARGETS = (
    Rule("step / DeepSpeed, same stage", "step", (1, 2, 3), ("deepspeed-{stage}",), 0.58, 0.72, ("fp32",), EVERY),
    Rule("step / DeepSpeed, same stage", "step", (1, 2, 3), ("deepspeed-{stage}",), 0.48, 0.72, ("bf16",), EVERY),
    Rule("step / FSDP2", "step", (3,), ("fsdp2",), 0.67, 0.80, ("fp32",)),
    Rule("step / FSDP2", "step", (3,), ("fsdp2",), 0.55, 0.80, ("bf16",)),
    Rule("step / DDP", "step", (0,), ("ddp",), 0.97, 1.00),
    Rule("step / DDP", "step", (1, 2), ("ddp",), 0.90, 1.00),
    Rule("step / compute only", "step", (0, 1, 2), ("compute",), 1.08, 1.25, ("fp32",)),
    Rule("step / compute only", "step", (3,), ("compute",), 1.12, 1.35, ("fp32",)),
    Rule("step / compute only", "step", (0, 1, 2), ("compute",), 1.15, 1.45, ("bf16",)),
    Rule("step / compute only", "step", (3,), ("compute",), 1.20, 1.60, ("bf16",)),
    Rule("step of 4 micro-batches / DeepSpeed", "step", (2,), ("deepspeed-2",), 0.58, 0.75, accumulation=4),
    Rule("peak memory / DDP", "peak", (0,), ("ddp",), 1.00, 1.00),
    Rule("peak memory / ZeroRedundancyOptimizer", "peak", (1,), ("zero-redundancy",), 0.95, 0.95),
    Rule("peak memory / best of DeepSpeed, FSDP2", "peak", (2,), ("deepspeed-2", "fsdp2-keep"), 0.75, 0.75),
    Rule("peak memory / best of DeepSpeed, FSDP2", "peak", (3,), ("deepspeed-3", "fsdp2"), 0.60, 0.60, ("fp32",)),
    Rule("peak memory / best of DeepSpeed, FSDP2", "peak", (3,), ("deepspeed-3", "fsdp2"), 0.70, 0.70, ("bf16",)),
    Rule("peak memory / formula + activations", "peak", (0, 1, 2, 3), ("limit",), 1.10, 1.10),
    Rule("single process: step / hand loop", "step", (0, 3), ("compute",), 1.02, None, world=1),
    Rule("single process: peak / hand loop", "peak", (0, 3), ("compute",), 1.02, None, world=1, slack=8e6),
    Rule("initialize / FSDP2's set-up", "set-up", (0, 1, 2, 3), ("fsdp2",), 1.00, 1.00),
)
FLAT = 1.2
"""A unit of 512 may cost so many times what a unit of 8 costs."""


@dataclass(frozen=True)
class Figure:
    """A measured figure and its limit."""

    what: str
    where: str
    engine: str
    value: float
    limit: float
    holds: bool


def state_bytes(dtype: str, stage: int, world: int) -> float:
    """Bytes of weights, gradients, masters and Adam's moments per parameter and rank; gradients add up in fp32."""
    if dtype == "fp32":
        return (16, 8 + 8 / world, 4 + 12 / world, 16 / world)[stage]
    return (18, 6 + 12 / world, 2 + 16 / world, 18 / world)[stage]


def limit_mb(parts: Sequence[int], dtype: str, stage: int, world: int, activations: float) -> float:
    """Formula + activations in MB; at stage 3 with two gathered units, a unit's gradient and its receive buffer."""
    item = 4 if dtype == "fp32" else 2
    total = sum(parts) * state_bytes(dtype, stage, world)
    if stage == 3:
        first, second = sorted(parts, reverse=True)[:2]
        total += item * (first + second) + item * first + item * first
    return total / 1e6 + activations


def activations_mb(parts: Sequence[int], dtype: str, hand_loop_peak: float) -> float:
    """What the hand-written loop's peak holds besides its state: MB."""
    return hand_loop_peak - sum(parts) * state_bytes(dtype, 0, 1) / 1e6


def paired(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def judge(result: dict[str, Any]) -> list[Figure]:
    """Every figure with a target that ``result`` has the measurements for."""
    figures = [figure for rule in TARGETS for figure in _rule(rule, result)]
    return figures + list(_units(result))


def _rule(rule: Rule, result: dict[str, Any]) -> Iterator[Figure]:
    for model in rule.models:
        for dtype in rule.dtypes:
            for stage in rule.stages:
                for suffix, limit in (("", rule.limit), ("-gloo", rule.gloo)):
                    name = f"shardline-{stage}{suffix}"
                    case = {"model": model, "dtype": dtype, "accumulation": rule.accumulation, "world": rule.world}
                    ratio = None if limit is None else _ratio(rule, result, case, name, stage)
                    if limit is not None and ratio is not None:
                        value, difference = ratio
                        holds = value <= limit or (rule.slack > 0 and difference * 1e6 <= rule.slack)
                        yield Figure(rule.what, _where(case), name, value, limit, holds)


def _where(case: dict[str, Any]) -> str:
    text = f"{case['model']} {case['dtype']}"
    return text + (f" x{case['accumulation']}" if case["accumulation"] > 1 else "")


def _ratio(
    rule: Rule, result: dict[str, Any], case: dict[str, Any], name: str, stage: int
) -> tuple[float, float] | None:
    """(Ratio to the best opponent, difference); ``None`` if one of them was not measured."""
    table = "starts" if rule.quantity == "set-up" else "runs"
    rows = [row for row in result.get(table, []) if all(row[key] == value for key, value in case.items())]
    ours = next((row for row in rows if row["engine"] == name), None)
    if ours is None:
        return None
    heat = {row["engine"]: row for row in rows if row.get("heat") == ours.get("heat")}
    opponents = [opponent.format(stage=stage) for opponent in rule.against]
    if rule.against == ("limit",):
        if "compute" not in heat:
            return None
        sizes = result["parts"][case["model"]]
        activations = activations_mb(sizes, case["dtype"], heat["compute"]["peak"])
        bound = limit_mb(sizes, case["dtype"], stage, case["world"], activations)
        return ours["peak"] / bound, ours["peak"] - bound
    present = [heat[opponent] for opponent in opponents if opponent in heat]
    if not present or (rule.quantity == "peak" and len(present) < len(opponents)):
        return None
    if rule.quantity == "peak":
        best = min(row["peak"] for row in present)
        return ours["peak"] / best, ours["peak"] - best
    return max(paired(ours["rounds"], row["rounds"]) for row in present), 0.0


def _units(result: dict[str, Any]) -> Iterator[Figure]:
    """Cost per unit and step, above the hand-written loop's, of 512 units against 8."""
    for world, what in ((1, "Python time per unit: 512 / 8 units"), (2, "time per unit: 512 / 8 units")):
        for name in ("shardline-2", "shardline-3"):
            costs = {count: unit_cost(result, name, count, world) for count in (8, 512)}
            if all(costs.values()):
                value = costs[512] / costs[8]  # type: ignore[operator]
                yield Figure(what, f"{1e6 * costs[512]:.0f} us at 512", name, value, FLAT, value <= FLAT)  # type: ignore[operator]


def unit_cost(result: dict[str, Any], name: str, count: int, world: int) -> float | None:
    """Seconds per unit and step that ``name`` adds to the hand-written loop."""
    rows = [row for row in result["runs"] if row["model"] == f"units-{count}" and row["world"] == world]
    ours = next((row for row in rows if row["engine"] == name), None)
    if ours is None:
        return None
    hand = next((row for row in rows if row["engine"] == "compute" and row["heat"] == ours["heat"]), None)
    if hand is None:
        return None
    return statistics.median((a - b) / count for a, b in zip(ours["rounds"], hand["rounds"], strict=True))
