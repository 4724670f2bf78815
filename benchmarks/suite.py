"""What is run: the cases of the whole suite and of the quick one, and which engines are run side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loops import ENGINES


@dataclass(frozen=True)
class Case:
    """The work that a set of engines is compared on."""

    model: str
    dtype: str
    accumulation: int = 1
    world: int = 2

    def __str__(self) -> str:
        return f"{self.model} {self.dtype}, accumulation {self.accumulation}, {self.world} ranks"


ZERO = ("deepspeed-0", "shardline-0")
Cases = Iterator[tuple[Case, list[str]]]


def starting(*prefixes: str) -> list[str]:
    """Names of engines."""
    return [name for name in ENGINES if name.startswith(prefixes)]


def full() -> Cases:
    """What ``make bench`` runs."""
    dtypes = ("fp32", "bf16")
    for dtype in dtypes:
        yield Case("gpt", dtype), list(ENGINES)
        yield Case("gpt", dtype, accumulation=4), starting("compute", "ddp", "deepspeed-2", "shardline-2")
        yield Case("gpt", dtype, world=1), ["compute", "shardline-0", "shardline-3"]
    for model in ("deep", "wide", "conv"):
        for dtype in dtypes:
            sharded = [name for name in starting("deepspeed", "shardline") if not name.startswith(ZERO)]
            yield Case(model, dtype), ["compute", "fsdp2", *sharded]
    for count in (8, 64, 512):
        for world in (1, 2):
            yield Case(f"units-{count}", "fp32", world=world), ["compute", "shardline-2", "shardline-3"]


def quick() -> Cases:
    """What ``make bench-quick`` runs: every engine, dtype and kind of model once, on next to no work."""
    yield Case("tiny", "fp32"), list(ENGINES)
    yield Case("tiny", "bf16", accumulation=2), list(ENGINES)
    yield Case("tiny-conv", "bf16"), ["compute", "ddp", "fsdp2", "shardline-3"]
    yield Case("units-8", "fp32", world=1), ["compute", "shardline-2"]


def heats(engines: Sequence[str], dtype: str) -> list[list[str]]:
    """``engines`` in groups that are run side by side: one for each stage, none that is part of another."""
    usable = [name for name in engines if not (ENGINES[name].low_only and dtype == "fp32")]
    groups: list[list[str]] = []
    for stage in range(4):
        group = [name for name in usable if stage in ENGINES[name].heats]
        if group and group not in groups:
            groups.append(group)
    return [group for group in groups if not any(set(group) < set(other) for other in groups)]
