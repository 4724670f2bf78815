"""The words of a configuration error: what was found, what is allowed, which known key is nearest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from shardline.errors import shown

__all__ = ["allowed", "found", "listed"]

TYPE_WORDS: dict[str, str] = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "a string",
    "object": "an object {...}",
    "array": "a list",
    "null": "null",
}


def found(value: object) -> str:
    """The value as JSON would show it, cut to one line; quotes are pointed at where they are the mistake."""
    if isinstance(value, str):
        value = value[:60]  # as much as is shown
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    text = shown(text, 60)
    return f"{text} (a string; write it without quotes)" if isinstance(value, str) and _is_literal(value) else text


def _is_literal(text: str) -> bool:
    """A number or truth value in quotes."""
    if text.lower() in ("true", "false"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def allowed(schema: Mapping[str, Any]) -> str:
    """What a JSON Schema of one plain value allows, in words; null is left out, it means the default everywhere."""
    if "anyOf" in schema:
        return " or ".join(allowed(option) for option in schema["anyOf"] if option.get("type") != "null")
    if "not" in schema:
        return f"anything but {listed(schema['not']['enum'])}"
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return listed(item for item in schema["enum"] if item is not None)
    kind = schema.get("type")
    if kind is None:
        return "any value"
    if isinstance(kind, list):
        return " or ".join(TYPE_WORDS[one] for one in kind)
    if kind == "array" and "items" in schema:
        length = f"{schema['minItems']} " if "minItems" in schema else ""
        return f"a list of {length}{schema['items']['type']}s"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"an object whose values are {allowed(schema['additionalProperties'])}"
    return TYPE_WORDS[kind] + _limits(schema)


def _limits(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    words = [
        f"{word} {limit:g}"
        for word, limit in (("of at least", low), ("above", above), ("of at most", high), ("below", below))
        if limit is not None
    ]
    return f" {' and '.join(words)}" if words else ""


def listed(items: Iterable[object], last: str = "or") -> str:
    """``"a", "b" or "c"``, values as in JSON."""
    words = [json.dumps(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}" if words else "nothing"
