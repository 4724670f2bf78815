"""What a rank can be doing: its codes on a page, and its words in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

__all__ = ["CALLS", "CALL_CODES", "Operation", "Phase", "call_of", "label_of", "name_of", "transfer"]


class Operation(IntEnum):
    """What ranks do together."""

    NONE = 0
    GATHER = 1
    REDUCE = 2
    COMPARE = 3
    NEGOTIATE = 4
    BROADCAST = 5
    MESSAGE = 6


class Phase(IntEnum):
    """Where in a training step a rank is."""

    OUTSIDE = 0
    FORWARD = 1
    BACKWARD = 2
    STEP = 3


CALLS = (
    "",
    "initialize",
    "save_checkpoint",
    "load_checkpoint",
    "export",
    "save_16bit_model",
    "full_state_dict",
    "full_optimizer_state_dict",
    "optimizer.load_state_dict",
    "gathered_parameters",
    "destroy",
)
"""Calls that all ranks make together: those of a training step (the first), and others."""

CALL_CODES = {name: code for code, name in enumerate(CALLS)}

_CALL_BITS, _UNIT_BITS = 4, 12
_MASK = 0xF


def label_of(operation: int, unit: int | None, call: int) -> int:
    """One number for a transfer: two ranks that make the same one have the same label."""
    return operation | call << _CALL_BITS | (0 if unit is None else unit + 1) << _UNIT_BITS


def call_of(label: int) -> str:
    return CALLS[label >> _CALL_BITS & 0xFF]


def name_of(unit: int, names: Sequence[str]) -> str:
    return f"unit {names[unit]!r}" if 0 <= unit < len(names) else f"unit {unit}"


def transfer(label: int, names: Sequence[str]) -> str:
    """``label`` in words; ``names`` are those of the units."""
    operation, unit = Operation(label & _MASK), (label >> _UNIT_BITS) - 1
    of = f" of {name_of(unit, names)}" if unit >= 0 else ""
    return {
        Operation.NONE: "a wait",
        Operation.GATHER: f"the gather{of}",
        Operation.REDUCE: f"the reduction{of}",
        Operation.COMPARE: "the comparison of the ranks at the end of the step",
        Operation.NEGOTIATE: "the agreement on what comes next",
        Operation.BROADCAST: "a broadcast",
        Operation.MESSAGE: "a message to all ranks",
    }[operation]
