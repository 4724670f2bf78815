"""JSON text to values: comments and trailing commas are allowed, duplicate keys are not."""

from __future__ import annotations

import json
import re
from typing import Any

from shardline.config.limits import DEPTH
from shardline.errors import ConfigError, shown
from shardline.names import join

__all__ = ["parse"]

STRING = r'"(?:\\.|[^"\\\n])*"'
COMMENT = re.compile(rf"({STRING})|//[^\n]*|\#[^\n]*|/\*.*?\*/", re.DOTALL)
TRAILING_COMMA = re.compile(rf"({STRING})|,(?=\s*[}}\]])")


class _Pairs(list[tuple[str, Any]]):
    """An object as the parser saw it, before duplicates are looked for."""


def parse(text: str, where: str) -> Any:
    """The value of JSON ``text``; ``where`` names its source in errors.

    Raises:
        ConfigError: the text is not JSON (with line and column), is nested deeper or holds longer numbers than can be
            read, or has a key twice (each by its path).
    """
    twice: list[str] = []
    try:
        value = json.loads(TRAILING_COMMA.sub(_blank, COMMENT.sub(_blank, text)), object_pairs_hook=_Pairs)
        tree = _tree(value, "", twice)
    except RecursionError:
        raise ConfigError(f"{where} is nested too deep to be read; allowed are {DEPTH} levels.") from None
    except json.JSONDecodeError as error:
        lines = text.splitlines() or [""]
        line = lines[min(error.lineno, len(lines)) - 1].strip()
        raise ConfigError(
            f"{where} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}: {shown(line, 200)}"
        ) from None
    except ValueError:  # of int(): it takes no more digits
        raise ConfigError(f"{where} holds a number of thousands of digits; allowed are 64 bits.") from None
    if twice:
        raise ConfigError(
            f"{where} holds {shown(', '.join(twice))} twice; keep one of each, since JSON would use the last."
        )
    return tree


def _blank(match: re.Match[str]) -> str:
    """Strings stay; anything else becomes spaces, so that positions in errors stay true."""
    return match[1] if match[1] is not None else re.sub(r"[^\n]", " ", match[0])


def _tree(value: Any, path: str, twice: list[str]) -> Any:
    if isinstance(value, _Pairs):
        tree: dict[str, Any] = {}
        for name, inner in value:
            at = join(path, name)
            if name in tree:
                twice.append(at)
            tree[name] = _tree(inner, at, twice)
        return tree
    if isinstance(value, list):
        return [_tree(item, f"{path}[{index}]", twice) for index, item in enumerate(value)]
    return value
