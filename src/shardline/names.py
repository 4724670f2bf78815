"""Names: dotted paths, lists of names and ranks in a message, the nearest known name, and arguments of a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from shardline.errors import ConfigError, text_of

__all__ = ["call", "closest", "join", "listed", "nearest", "outwards", "ranks_text"]

T = TypeVar("T")
LONGEST = 200
"""Characters of a name that another may be like."""


def join(path: str, name: str) -> str:
    """The dotted path of ``name`` in ``path``; ``""`` is the root."""
    return f"{path}.{name}" if path else name


def outwards(path: str) -> Iterator[str]:
    """``path`` and what it lies in: ``"a.b"``, ``"a"``, ``""``."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def listed(items: Sequence[object], most: int) -> str:
    """``a, b and 3 more``: the first ``most`` of ``items``, and how many there are besides."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more


def ranks_text(ranks: Sequence[int]) -> str:
    """``rank 0``, ``ranks 1 to 3``, or ``ranks 0, 2, 5``; of many the first eight, and how many more."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {listed(ranks, 8)}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence with a leading space that names the nearest of ``known`` whatever its case, or an empty string."""
    found = closest(name, known)
    return f" Did you mean {found!r}?" if found else ""


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like ``name``, ignoring case, or None if none is alike."""
    if len(name) > LONGEST:  # the search takes time with the square of the length
        return None
    by_folded = {one.casefold(): one for one in known}
    found = get_close_matches(name.casefold(), by_folded, n=1, cutoff=cutoff)
    return by_folded[found[0]] if found else None


def call(target: Callable[..., T], *given: Any, what: str, params: Mapping[str, Any], also: Collection[str] = ()) -> T:
    """``target(*given, **params)`` for parameters a user wrote; every mistake in them is a `ConfigError`.

    ``what`` names the target in messages (``optimizer AdamW``); ``also`` are further names it is documented to take.
    """
    signature = inspect.signature(target)
    named = list(signature.parameters.values())[len(given) :]
    known = [one.name for one in named if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    for name in params:
        if name not in known:
            listed = ", ".join(sorted({*known, *also}))
            raise ConfigError(f"{what} has no parameter {name!r}.{nearest(name, [*known, *also])} It takes: {listed}.")
    missing = [one.name for one in named if one.name in known and one.default is one.empty and one.name not in params]
    if missing:
        raise ConfigError(f"{what} needs the parameter {missing[0]!r}, which is not given: add it to its params.")
    try:
        return target(*given, **params)
    except ConfigError as error:
        raise ConfigError(f"{what}: {text_of(error)}") from None
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{what} cannot be built from its params {dict(params)}: {text_of(error)}") from error
