"""The batch triangle: train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x world size."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

__all__ = ["ACCUMULATION", "KEYS", "MICRO", "TRAIN", "UNEVEN", "Batch", "BatchError", "solve", "solve_changing"]

TRAIN, MICRO, ACCUMULATION = KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)
UNEVEN = "data_loader.uneven"
_SET_UNEVEN = f"set {UNEVEN}: true, which cuts a batch into pieces that differ by at most one sample"


class BatchError(ValueError):
    """The given sizes do not fit; the message names sizes that would."""


@dataclass(frozen=True)
class Batch:
    """The solved triangle; ``origins`` has, for each computed key, how it was computed."""

    train: int
    micro: int
    accumulation: int
    origins: dict[str, str]


def solve(train: int | None, micro: int | None, accumulation: int | None, world: int, uneven: bool = False) -> Batch:
    """The three sizes from those given (each at least 1, None for not given) on ``world`` ranks.

    Two give the third; train or micro alone stands with accumulation 1. With ``uneven`` train need not be a multiple
    of world x accumulation, and micro is the size of the largest piece, ceil(train / (world x accumulation));
    where accumulation is not given, a given micro is the most that a piece may have.

    Raises:
        BatchError: too few sizes are given, or they do not fit together; names the fixes with numbers.
    """
    origins: dict[str, str] = {}
    if train is None and micro is None:
        given = accumulation or 1
        raise BatchError(
            f"neither {TRAIN} nor {MICRO} is given; on {_ranks(world)} with accumulation {given}, "
            f"{MICRO} 1 is {TRAIN} {world * given}, and {MICRO} 8 is {TRAIN} {8 * world * given}."
        )
    if accumulation is None:
        if train is not None and micro is not None:
            accumulation = ceil(train / (micro * world)) if uneven else _divide_by_micro(train, micro, world)
            origins[ACCUMULATION] = f"computed: {TRAIN} {train} / (micro {micro} x world {world})"
        else:
            accumulation = 1
            origins[ACCUMULATION] = f"computed: 1, since {MICRO if train is None else TRAIN} is given alone"
    pieces = world * accumulation
    if train is None:
        if micro is None:
            raise AssertionError(f"neither {TRAIN} nor {MICRO} is given, and no error said so")
        origins[TRAIN] = f"computed: micro {micro} x accumulation {accumulation} x world {world}"
        return Batch(micro * pieces, micro, accumulation, origins)
    largest = ceil(train / pieces)
    as_given = micro == largest and (uneven or train == micro * pieces)
    if micro is not None and not as_given and not (uneven and ACCUMULATION in origins):
        raise BatchError(_mismatch(train, micro, accumulation, world, uneven))
    if train % pieces and not uneven:
        raise BatchError(
            f"{TRAIN} {train} is not divisible by world {world} x accumulation {accumulation} = {pieces}; "
            f"{TRAIN} {_multiples(train, pieces)} would be, or {_SET_UNEVEN}."
        )
    if micro != largest:
        how = ", rounded up" if train % pieces else ""
        origins[MICRO] = f"computed: {TRAIN} {train} / (world {world} x accumulation {accumulation}){how}"
    return Batch(train, largest, accumulation, origins)


def solve_changing(
    train: int | None, micro: int | None, accumulation: int | None, world: int, uneven: bool | None
) -> Batch:
    """As :func:`solve`, in a job that may go on with another number of ranks: train stands, so that they all take the
    same batches. Where the sizes do not fit this ``world``, a given micro is the most that a piece may have, and
    accumulation follows.

    Args:
        uneven: None if it is not given: it is then true where it is needed, which the origins record.

    Raises:
        BatchError: train is not given, or ``uneven`` is False and the sizes do not fit.
    """
    if train is None:
        would_be = "" if micro is None else f"; here it would be {micro * (accumulation or 1) * world}"
        raise BatchError(
            f"nodes may come and go, so {TRAIN} must be given, which stays the same however many there are{would_be}."
        )
    try:
        return solve(train, micro, accumulation, world, bool(uneven))
    except BatchError:
        if uneven is False:
            raise
    solved = solve(train, micro, accumulation if micro is None else None, world, uneven=True)
    if train % (solved.accumulation * world):
        solved.origins[UNEVEN] = f"computed: true, since nodes may come and go, and there are {_ranks(world)} now"
    return solved


def _divide_by_micro(train: int, micro: int, world: int) -> int:
    step = micro * world
    if train % step:
        fix = f"{TRAIN} {_multiples(train, step)} would be"
        if train % world == 0:  # a smaller micro-batch, the largest that fits
            divisor = max(size for size in range(1, micro + 1) if (train // world) % size == 0)
            fix += f", or {MICRO} {divisor}"
        raise BatchError(
            f"{TRAIN} {train} is not divisible by micro {micro} x world {world} = {step}; {fix}, or {_SET_UNEVEN}."
        )
    return train // step


def _mismatch(train: int, micro: int, accumulation: int, world: int, uneven: bool) -> str:
    pieces = world * accumulation
    largest = ceil(train / pieces)
    fixes = [f"{TRAIN} {micro * pieces}"]
    if uneven or train % pieces == 0:
        fixes.append(f"{MICRO} {largest}")
    if uneven:
        wrong = f"{TRAIN} {train} over world {world} x accumulation {accumulation} makes pieces of at most {largest}, "
        wrong += f"and {MICRO} is {micro}"
    else:
        wrong = f"{TRAIN} {train} is not micro {micro} x accumulation {accumulation} x world {world} = {micro * pieces}"
        if train % (micro * world) == 0:
            fixes.append(f"{ACCUMULATION} {train // (micro * world)}")
    return f"{wrong}; {' or '.join(fixes)} would fit, or leave {MICRO if uneven else TRAIN} out."


def _multiples(size: int, step: int) -> str:
    """The multiples of ``step`` around ``size``: ``8 or 16`` for 12 and 8."""
    below = size // step * step
    return f"{below} or {below + step}" if below else str(step)


def _ranks(world: int) -> str:
    return f"{world} rank{'s' if world > 1 else ''}"
