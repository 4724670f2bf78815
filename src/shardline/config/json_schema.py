"""The JSON Schema (Draft 2020-12) of a configuration file, for editors: it accepts what `load_config` accepts."""

from __future__ import annotations

from typing import Any

from shardline.config.catalogue import OPEN, Key, catalogue, fields, split, takes_auto
from shardline.config.deepspeed import ALIASES, NOT_NULL, UNSUPPORTED
from shardline.config.kinds import Section
from shardline.config.schema import Config
from shardline.names import join

__all__ = ["json_schema"]

JSON = dict[str, Any]


def json_schema() -> JSON:
    """Sections are closed, other names are listed with the canonical ones, ``"auto"`` stands where it is taken."""
    schema = _object("", list(catalogue(Config).values()))
    schema["properties"]["$schema"] = {"type": "string", "description": "Where this schema lies."}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Shardline training configuration"}
    return {**head, **schema, "type": "object"}


def _object(path: str, keys: list[Key]) -> JSON:
    """The closed object at ``path``, of those ``keys`` that lie directly in it."""
    here = [key for key in keys if split(key.path)[0] == path and key.kind != "alias"]
    properties = {split(key.path)[1]: _property(key, keys) for key in here}
    for old, new in ALIASES.items():
        if split(old)[0] == path:
            properties[split(old)[1]] = {
                **_property(catalogue(Config)[new], keys),
                "description": f"Another name of {new}.",
            }
    needed = [split(key.path)[1] for key in here if key.required]
    comments = {"^(_|//)": {"description": "A comment."}}
    closed = {"properties": properties, "patternProperties": comments, "additionalProperties": False}
    return {**_absent(), **closed, "required": needed}


def _absent() -> JSON:
    """An object, or the null or false that leaves it out."""
    return {"type": ["object", "null", "boolean"], "not": {"const": True}}


def _property(key: Key, keys: list[Key]) -> JSON:
    if key.kind == "section":
        schema = _typed(key.path, keys) if join(key.path, "params") in OPEN else _object(key.path, keys)
        return {"description": key.description, **schema}
    refusal = UNSUPPORTED.get(key.path)
    schema = {**(key.schema or {}), **(refusal.schema() if refusal else {})}
    words = {"no effect": "No effect: ", "unsupported": "Not supported: "}.get(key.kind, "")
    text: JSON = {"description": f"{words}{key.description}"}
    if key.kind == "value" and not key.required:
        text["default"] = key.default
    if key.required:
        refused = refusal.refused if refusal else ()
        return {**text, **schema, "not": {"enum": [*refused, "auto"]}}
    if key.path in NOT_NULL:
        return {**text, **schema}
    return {**text, "anyOf": [schema, {"enum": [None, "auto"] if takes_auto(key) else [None]}]}


def _typed(path: str, keys: list[Key]) -> JSON:
    """A section whose ``params`` depend on its ``type``; those of a class that is not known here are open."""
    schema = _object(path, keys)
    params = join(path, "params")
    schema["properties"]["params"] = {"description": catalogue(Config)[params].description, **_absent()}
    schema["allOf"] = [
        {
            "if": {"properties": {"type": {"pattern": _any_case(name)}}, "required": ["type"]},
            "then": {"properties": {"params": _params(params, model)}},
        }
        for name, model in OPEN[params].items()
    ]
    return schema


def _params(path: str, model: type[Section]) -> JSON:
    own = list(fields(model, path))
    tables = [key for key in catalogue(Config).values() if key.kind in ("no effect", "unsupported")]
    return _object(path, [*own, *tables])


def _any_case(name: str) -> str:
    return "^" + "".join(f"[{letter.upper()}{letter.lower()}]" for letter in name) + "$"
