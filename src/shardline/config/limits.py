"""What no configuration needs: refused before it is copied or walked, whichever key it is at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from shardline.errors import ConfigError, shown
from shardline.names import join

__all__ = ["BYTES", "DEPTH", "check"]

BYTES = 4 << 20
DEPTH = 50
VALUES = 100_000
WHOLE = 2**63
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""The normal numbers of fp32, in which losses, rates and norms are computed."""
_JSON = (str, int, float, Mapping, list, tuple, BaseModel, type(None))


def check(tree: Any, where: str) -> None:
    """Raise if a value of ``tree`` goes beyond the limits; ``where`` names its source.

    Raises:
        ConfigError: it is nested too deep (or holds itself) or has too many values, a number is not 0 and fp32 cannot
            hold it, a whole number takes more than 64 bits, a string holds a NUL, or JSON has no such value.
    """
    left = [(tree, "", 0)]
    seen = 0
    while left:
        value, path, depth = left.pop()
        seen += 1
        if depth > DEPTH:
            raise ConfigError(f"{where} is nested too deep at {shown(path, 100)}; allowed are {DEPTH} levels.")
        inner = list(_inside(value, path))
        if seen + len(left) + len(inner) > VALUES:
            raise ConfigError(f"{where} holds more than {VALUES} values.")
        left += [(item, at, depth + 1) for at, item in inner]
        if problem := _problem(value):
            raise ConfigError(f"{where} cannot be used: {shown(path, 200) or 'it'} {problem}.")


def _inside(value: Any, path: str) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(join(path, str(name)), inner) for name, inner in value.items()]
    if isinstance(value, list | tuple):
        return [(f"{path}[{index}]", inner) for index, inner in enumerate(value)]
    return ()


def _problem(value: Any) -> str:
    if isinstance(value, int) and not -WHOLE <= value < WHOLE:
        return f"is a whole number of {value.bit_length()} bits; allowed are those from -2^63 to 2^63 - 1"
    if isinstance(value, float) and value not in (0, float("inf"), float("-inf")):
        size = abs(value)
        if size < SMALLEST or size > LARGEST:
            return (
                f"is {value:g}, which fp32 does not hold; allowed are 0 and sizes from {SMALLEST:.3g} to {LARGEST:.3g}"
            )
    if isinstance(value, str) and "\0" in value:
        return "holds a NUL character, which no path or name can; leave it out"
    if not isinstance(value, _JSON) and not _has_json(value):
        kind = type(value)
        return (
            f"is of type {shown(f'{kind.__module__}.{kind.__qualname__}', 100)}, which JSON has no value for; allowed "
            f"are objects, lists, strings, numbers, true, false and null"
        )
    return ""


def _has_json(value: Any) -> bool:
    """Whether it can be written as JSON all the same, as a path can: arguments of a registered sink may be such."""
    try:
        to_jsonable_python(value)
    except Exception:  # of whatever class: code of the value's own may run
        return False
    return True
