"""Every key there is, flat: a dotted path to its kind, JSON Schema, default and meaning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from shardline.config.deepspeed import ALIASES, AUTO_IS_A_VALUE, AUTO_NEEDS, NO_EFFECT, UNSUPPORTED
from shardline.config.kinds import Section, adapter, section_of
from shardline.config.params import OPTIMIZERS, SCHEDULERS
from shardline.names import join

__all__ = ["OPEN", "Key", "catalogue", "fields", "split", "takes_auto", "typed"]

OPEN: dict[str, dict[str, type[Section]]] = {"optimizer.params": OPTIMIZERS, "scheduler.params": SCHEDULERS}
"""Objects whose keys depend on the ``type`` in the same section."""


@dataclass(frozen=True)
class Key:
    """One key: ``schema`` is the JSON Schema of a plain value, None for a section."""

    path: str
    kind: Literal["section", "value", "no effect", "unsupported", "alias"]
    description: str
    schema: dict[str, Any] | None = None
    default: Any = None
    required: bool = False


def split(path: str) -> tuple[str, str]:
    """``a.b.c`` to (``a.b``, ``c``)."""
    parent, _, name = path.rpartition(".")
    return parent, name


def takes_auto(key: Key) -> bool:
    return not key.required and key.path not in AUTO_IS_A_VALUE and key.path not in AUTO_NEEDS


def fields(model: type[Section], path: str = "") -> Iterator[Key]:
    """The typed keys below ``model`` in the order of the schema, sections before what they hold."""
    for name, field in model.model_fields.items():
        at, text = join(path, name), field.description or ""
        if (section := section_of(field)) is not None:
            yield Key(at, "section", text)
            yield from fields(section, at)
        elif name in model.open_fields:
            yield Key(at, "section", text)
        else:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            schema = adapter(model, name).json_schema()
            if isinstance(default, tuple):
                default = list(default)  # as JSON has it
            yield Key(at, "value", text, schema, default, field.is_required())


@cache
def typed(root: type[Section]) -> frozenset[str]:
    """The dotted paths of all keys that the schema holds, without their JSON Schemas, which take long to make."""

    def walk(model: type[Section], path: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield join(path, name)
            if (section := section_of(field)) is not None:
                yield from walk(section, join(path, name))

    starts = [("", root), *((path, model) for path, models in OPEN.items() for model in models.values())]
    return frozenset(found for path, model in starts for found in walk(model, path))


@cache
def catalogue(root: type[Section]) -> dict[str, Key]:
    """All keys by dotted path. ``params`` of optimizers and schedulers hold the keys of all known types together."""
    keys = {key.path: key for key in fields(root)}
    for path, models in OPEN.items():
        for model in models.values():
            keys.update({key.path: key for key in fields(model, path)})
    for path, ineffective in NO_EFFECT.items():
        keys[path] = Key(path, "no effect", ineffective.reason, ineffective.schema())
    for path, refusal in UNSUPPORTED.items():
        if path not in keys:
            keys[path] = Key(path, "unsupported", refusal.reason, refusal.schema())
    for old, new in ALIASES.items():
        keys[old] = Key(old, "alias", new)
    return keys
