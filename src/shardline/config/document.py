"""Write docs/config.md from the schema: ``python -m shardline.config.document > docs/config.md``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator

from shardline.config.catalogue import OPEN, Key, catalogue, fields, split
from shardline.config.deepspeed import ALIASES, AUTO_NEEDS, NO_EFFECT, UNSUPPORTED, Unsupported
from shardline.config.schema import Config
from shardline.config.sentences import allowed, listed

__all__ = ["document"]

HEAD = """\
# Configuration

<!-- Written from the schema by `python -m shardline.config.document > docs/config.md`; edit the schema instead. -->

A configuration is a dict, a JSON file or a `shardline.Config`, given to `shardline.initialize(config=...)`. Its
structure and names are those of DeepSpeed's training configuration, with a few keys of Shardline's own, which are
marked.

* Every key is known or an error: an unknown one is reported with its path and the nearest known key, all problems of a
  configuration at once. `shardline config check FILE` does the same without a run, `shardline config explain FILE`
  prints every value with its origin, `shardline config schema` a JSON Schema for editors.
* Files may hold comments (`//`, `#`, `/* */`, keys that begin with `_` or `//`) and trailing commas, but no key twice.
  Whole numbers may be written as `5e8`. `null` means the default, but for `zero_optimization.stage`; a section may be
  `null` or `false` to leave it out.
* Two of `train_batch_size`, `train_micro_batch_size_per_gpu` and `gradient_accumulation_steps` give the third:
  train = micro x accumulation x world size. Without accumulation, train or micro alone stands with accumulation 1.
* `"auto"` means the default, except where a table below says that it is not taken. Where a trainer fills it in,
  `shardline config check FILE --filled-by transformers` puts stand-ins in its place.
* `gradient_clipping` is 0.0 unless written: **no key, no clipping**. DeepSpeed 0.19 clips at 1.0 without the key.
"""


def document() -> str:
    """The page, in Markdown."""
    parts = [HEAD]
    keys = catalogue(Config)
    sections = {"": "Top level"} | {key.path: f"`{key.path}`" for key in keys.values() if key.kind == "section"}
    for path, title in sections.items():
        if path in OPEN:
            for model in dict.fromkeys(OPEN[path].values()):
                names = " and ".join(name for name, one in OPEN[path].items() if one is model)
                parts.append(_section(f"{title} of {names}", "", fields(model, path)))
        else:
            text = keys[path].description if path else ""
            own = [key for key in keys.values() if key.kind == "value" and split(key.path)[0] == path]
            parts.append(_section(title, text, own))
    parts.append(_pairs("Other names", "", ("Name", "The same as"), ((f"`{a}`", f"`{b}`") for a, b in ALIASES.items())))
    parts.append(
        _pairs(
            'Where "auto" is not taken',
            "It stands for a decision that nothing in the file can make.",
            ("Key", "Why"),
            ((f"`{path}`", reason) for path, reason in AUTO_NEEDS.items()),
        )
    )
    parts.append(
        _pairs(
            "Accepted without effect",
            "The engine lists those that a configuration holds once at start.",
            ("Key", "Why"),
            ((f"`{path}`", row.reason) for path, row in NO_EFFECT.items()),
        )
    )
    parts.append(
        _pairs(
            "Not supported",
            "An error with a value that would turn it on; accepted when switched off.",
            ("Key", "Why, or what instead"),
            ((f"`{path}`{_refused(row)}", row.reason) for path, row in UNSUPPORTED.items()),
        )
    )
    return "\n".join(parts)


def _refused(row: Unsupported) -> str:
    return f": {listed(row.refused)}" if row.refused else ""


def _section(title: str, text: str, keys: Iterable[Key]) -> str:
    head = ["| Key | Allowed | Default | Meaning |", "|---|---|---|---|"]
    lines = [f"## {title}", "", *([text, ""] if text else []), *head]
    for key in keys:
        default = "required" if key.required else f"`{json.dumps(key.default)}`"
        words = allowed(key.schema or {}) + (', not "auto"' if key.path in AUTO_NEEDS else "")
        lines.append(f"| `{split(key.path)[1]}` | {words} | {default} | {key.description} |")
    return "\n".join([*lines, ""])


def _pairs(title: str, text: str, head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    def lines() -> Iterator[str]:
        yield from (f"## {title}", "")
        yield from ((text, "") if text else ())
        yield from (f"| {head[0]} | {head[1]} |", "|---|---|")
        yield from (f"| {one} | {other} |" for one, other in rows)

    return "\n".join([*lines(), ""])


if __name__ == "__main__":
    sys.stdout.write(document())
