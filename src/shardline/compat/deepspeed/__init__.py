"""Shardline under the names of DeepSpeed: scripts and trainers that were written for it run unchanged.

    import shardline.compat.deepspeed as deepspeed            # one line of a script
    shardline run --as-deepspeed train.py ...                 # no line of it
    python -m shardline.compat.deepspeed train.py ...         # the same, without the launcher

A thin layer over public calls of the engine. ``table`` says which name is which; names that are not offered
(``refusals``) can be imported, and say why when they are used.
"""

from __future__ import annotations

from typing import Any

from shardline.compat.deepspeed import table
from shardline.compat.deepspeed.finder import install

install()


def __getattr__(name: str) -> Any:
    value = table.resolve("", name)
    if not name.startswith("__"):
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *table.NAMES[""], *table.submodules("")})
