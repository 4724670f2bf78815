"""Reading what the user wrote against the schema: every problem is noted, and reading goes on."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from shardline.config.catalogue import OPEN, catalogue, split, typed
from shardline.config.deepspeed import (
    ALIASES,
    AUTO_IS_A_VALUE,
    AUTO_MEANS,
    AUTO_NEEDS,
    BY_TRAINER,
    CHECK_FILLED,
    NO_EFFECT,
    NOT_NULL,
    UNSUPPORTED,
    is_comment,
)
from shardline.config.kinds import Section, adapter, left_out, section_of
from shardline.config.sentences import allowed, found
from shardline.errors import ConfigError, shown
from shardline.names import closest, join

__all__ = ["Reading"]

AUTO = "auto"
MOST = 50
"""Problems that an error spells out."""


@dataclass
class Reading:
    """One pass over a configuration: its problems, its keys without effect, and where each value came from.

    Attributes:
        root: the top of the schema.
        origin: the word for a value that the user wrote, ``file`` or ``given``.
        problems: sentences, in the order of the configuration; ``bad`` holds the dotted paths they are about.
        undecided: problems by path that a later step may still solve: an ``"auto"`` that depends on other keys.
        no_effect: dotted keys that were accepted and do nothing.
        origins: where the value at a dotted path came from; a path that is missing holds its default.
        written: canonical path to the other name that the user wrote.
        more: number of problems beyond the first ``MOST``, which are not spelt out.
    """

    root: type[Section]
    origin: str = "file"
    problems: list[str] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)
    undecided: dict[str, str] = field(default_factory=dict)
    no_effect: list[str] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    more: int = 0

    def problem(self, path: str, sentence: str) -> None:
        self.bad.add(path)
        if len(self.problems) < MOST:
            self.problems.append(shown(sentence, 2000))
        else:
            self.more += 1

    def finish(self, where: str = "") -> None:
        """Raise all problems as one ConfigError, one sentence each; return if there are none."""
        problems = [*self.problems, *(shown(sentence, 2000) for sentence in self.undecided.values())]
        if not problems:
            return
        source = f"The configuration {where}".rstrip()
        if len(problems) == 1:
            raise ConfigError(f"{source} cannot be used: {problems[0]}")
        lines = "".join(f"\n  - {problem}" for problem in problems)
        rest = f"\n  - and {self.more} more." if self.more else ""
        raise ConfigError(f"{source} cannot be used, for {len(problems) + self.more} reasons:{lines}{rest}")

    def values(self, model: type[Section], raw: Any, path: str = "") -> dict[str, Any]:
        """The values of ``raw`` by field name: only what was written, checked, under canonical names."""
        raw = _plain(raw)
        if left_out(raw):
            return {}
        if not isinstance(raw, Mapping):
            self._wrong(path, raw, {"type": "object"})
            return {}
        raw = {name: value for name, value in raw.items() if not is_comment(name)}
        if not path:
            raw = self._rename(raw)
        values: dict[str, Any] = {}
        for name, value in raw.items():
            at = join(path, str(name))
            if name not in model.model_fields and at not in NO_EFFECT and at not in UNSUPPORTED:
                # beyond the limit it is not shown, and looking for the nearest key takes long
                short = len(self.problems) >= MOST
                self.problem(at, "" if short else _unknown(self.root, model, path, str(name)))
            elif self._settled(at, value):
                continue
            elif name in model.open_fields:
                values[name] = self._open(model.model_of(name, raw), value, at)
            elif (inner := section_of(model.model_fields[name])) is not None:
                if not left_out(value):
                    # Built without validating again: each value was checked on its own, and a wrong one left out.
                    values[name] = inner.model_construct(**self.values(inner, value, at))
            else:
                self._leaf(model, name, value, at, values)
        for name, info in model.model_fields.items():
            at = join(path, name)
            if name in model.open_fields and name not in raw:
                self._open(model.model_of(name, raw), {}, at)  # finds what is missing
            if info.is_required() and name not in values and at not in self.bad:
                self.problem(at, f"{at} is missing: {(info.description or '').rstrip('.')}; write it.")
        return values

    def _rename(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """A copy in which each key stands under its canonical name."""
        tree = {
            key: deepcopy(_plain(value)) for key, value in raw.items() if key != "$schema"
        }  # that one is for editors
        for old, new in ALIASES.items():
            source = _holder(tree, old)
            if source is None or split(old)[1] not in source:
                continue
            value = source.pop(split(old)[1])
            target = _holder(tree, new, create=True)
            if target is None or split(new)[1] in target:
                self.problem(new, f"{old} and {new} are two names of one key; keep one of them.")
            else:
                target[split(new)[1]] = value
                self.written[new] = old
        return tree

    def _settled(self, at: str, value: Any) -> bool:
        """Whether the tables of DeepSpeed's names handle this key completely."""
        if (ineffective := NO_EFFECT.get(at)) is not None:
            if value not in (None, AUTO) and not ineffective.accepts(value):
                self._wrong(at, value, ineffective.schema())
            self.no_effect.append(self._as_written(at))
            return True
        refusal = UNSUPPORTED.get(at)
        if refusal is None:
            return False
        if not (refusal.accepts(value) or value is None or (value == AUTO and at not in AUTO_IS_A_VALUE)):
            self.problem(at, f"{self._as_written(at)}: {found(value)} is not supported; {refusal.reason}.")
            return True
        return at not in typed(self.root)

    def _open(self, model: type[Section] | None, value: Any, at: str) -> dict[str, Any]:
        """The arguments of a class: checked where the class is known, else only rid of ``"auto"``."""
        if model is not None or left_out(value):
            return self.values(model or Section, value, at)
        if not isinstance(value, Mapping):
            self._wrong(at, value, {"type": "object"})
            return {}
        values: dict[str, Any] = {}
        for name, inner in value.items():
            path = join(at, str(name))
            if is_comment(name) or self._settled(path, inner):
                continue
            if inner == AUTO:
                self.origins[path] = "auto: the class's default"
            else:
                values[name] = inner
                self.origins[path] = self.origin
        return values

    def _leaf(self, model: type[Section], name: str, value: Any, at: str, values: dict[str, Any]) -> None:
        """Check one plain value and add it to ``values``; a wrong one and a default are not added."""
        required = model.model_fields[name].is_required()
        if isinstance(value, str) and value == AUTO and at not in AUTO_IS_A_VALUE:
            if at in AUTO_MEANS:
                values[name], meaning = AUTO_MEANS[at]
                self.origins[at] = f"auto: {meaning}"
            elif at in AUTO_NEEDS:
                self.undecided[at] = f'{self._as_written(at)} is "auto", which {AUTO_NEEDS[at]}.'
            elif required:
                sentence = f'{self._as_written(at)} is "auto", which {BY_TRAINER} and nothing here can decide'
                self.problem(at, f"{sentence}; write a value ({CHECK_FILLED}).")
            else:
                self.origins[at] = "auto: the default"
            return
        try:
            values[name] = adapter(model, name).validate_python(value, strict=True)
            self.origins[at] = self.origin
        except ValidationError:
            if value is None and not required and at not in NOT_NULL:
                return  # null means the default wherever it is not a value of its own
            schema = adapter(model, name).json_schema()
            items = schema.get("additionalProperties")
            if not (isinstance(value, Mapping) and isinstance(items, dict)):
                self._wrong(at, value, schema)
                return
            for item, inner in value.items():
                try:
                    adapter(model, name).validate_python({item: inner}, strict=True)
                except ValidationError:
                    self._wrong(join(at, str(item)), inner, items)

    def _wrong(self, at: str, value: Any, schema: Mapping[str, Any]) -> None:
        shown = self._as_written(at) or "it"
        self.problem(at, f"{shown} is {found(value)}; allowed is {allowed(schema)}.")

    def _as_written(self, at: str) -> str:
        """The path under the name that the user chose."""
        for new, old in self.written.items():
            if at == new or at.startswith(f"{new}."):
                return old + at.removeprefix(new)
        return at


def _unknown(root: type[Section], model: type[Section], path: str, name: str) -> str:
    """The sentence about a key ``name`` that ``model``, found at ``path``, does not have."""
    places: dict[str, list[str]] = {}
    for known in catalogue(root):
        parent, last = split(known)
        places.setdefault(last, []).append(parent)
    if path in OPEN:  # holds the keys of one type, the catalogue those of all
        here, siblings = f"{path} of {model.__name__.removesuffix('Params')}", set(model.model_fields)
    else:
        here, siblings = path or "the top level", {last for last, parents in places.items() if path in parents}
    start = f"{shown(join(path, name), 200)} is not a key of {here}"
    elsewhere = [parent or "the top level" for parent in places.get(name, ()) if parent != path]
    if elsewhere:
        return f"{start}; {name} belongs to {' or '.join(elsewhere)}."
    if close := closest(name, siblings):
        return f"{start}; did you mean {join(path, close)}?"
    if far := closest(name, places, cutoff=0.75):
        return f"{start}; did you mean {' or '.join(join(parent, far) for parent in places[far])}?"
    return f"{start}; its keys are {', '.join(model.model_fields)}."


def _plain(value: Any) -> Any:
    return value.model_dump(exclude_unset=True) if isinstance(value, Section) else value


def _holder(tree: dict[str, Any], path: str, create: bool = False) -> dict[str, Any] | None:
    """The object in ``tree`` that holds the last name of ``path``; None where there is none."""
    for name in filter(None, split(path)[0].split(".")):
        if create and tree.get(name) is None:
            tree[name] = {}
        inner = tree.get(name)
        if not isinstance(inner, dict):
            return None
        tree = inner
    return tree
