"""The resolved configuration as lines for people: each value and where it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from shardline.config.catalogue import split
from shardline.config.deepspeed import ALIASES, NO_EFFECT
from shardline.config.schema import Config
from shardline.errors import shown
from shardline.names import join

__all__ = ["explain", "flat", "ineffective"]


def explain(config: Config) -> str:
    """The whole tree of a resolved configuration, a value a line with its origin, then the keys without effect.

    An origin is ``file`` or ``given`` (a dict), ``default``, ``computed: ...`` or ``auto: ...``.
    """
    rows = list(_rows(config.to_dict(), config.origins))
    width = max(len(text) for text, _ in rows)
    lines = [f"{text:<{width}}  {origin}".rstrip() for text, origin in rows]
    return "\n".join([*lines, *(f"no effect: {line}" for line in ineffective(config))])


def ineffective(config: Config) -> list[str]:
    """``key: reason`` for each key that was written and does nothing."""
    return [f"{key}: {NO_EFFECT[ALIASES.get(key, key)].reason}" for key in config.no_effect]


def _rows(tree: Mapping[str, Any], origins: Mapping[str, str], path: str = "") -> Iterator[tuple[str, str]]:
    indent = "  " * (path.count(".") + 1 if path else 0)
    # An "auto" that is left to a class outside the configuration has an origin and no value.
    left = [name for parent, name in map(split, origins) if parent == path and name not in tree]
    for name, value in tree.items():
        at = join(path, name)
        below = any(origin.startswith(f"{at}.") for origin in origins)
        if isinstance(value, Mapping) and (value or below) and at not in origins:
            yield f"{indent}{shown(name)}:", ""
            yield from _rows(value, origins, at)
        else:
            yield f"{indent}{shown(name)}: {json.dumps(value)}", origins.get(at, "default")
    for name in left:
        yield f'{indent}{shown(name)}: "auto"', origins[join(path, name)]


def flat(config: Config) -> dict[str, Any]:
    """The values of a resolved configuration by dotted path."""

    def walk(tree: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
        for name, value in tree.items():
            at = join(path, name)
            if isinstance(value, Mapping) and value:
                yield from walk(value, at)
            else:
                yield at, value

    return dict(walk(config.to_dict(), ""))
