"""Files of lines that go on where a run does: without the steps that a kill took back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

__all__ = ["go_on"]


def go_on(path: Path, step: int, step_of: Callable[[str], int | None], head: str = "") -> TextIO:
    """Open ``path`` to append lines of steps after ``step``.

    At step 0 a file that is there belongs to another run, and gets a number in its name. Else its lines of later steps
    are taken out, with a last one that is not complete. The system has each line as soon as it is written, so a kill
    loses none.

    Args:
        step_of: the step of a line, or None for one that stays.
        head: the first line of a new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and step == 0:
        numbers = iter(range(1, 1_000_000))
        aside = next(each for n in numbers if not (each := path.with_name(f"{path.stem}.{n}{path.suffix}")).exists())
        path.rename(aside)
    elif path.exists():
        kept = [line for line in _lines(path) if (at := step_of(line)) is None or at <= step]
        draft = path.with_name(f"{path.name}.tmp")
        draft.write_text("".join(kept), encoding="utf-8")
        os.replace(draft, path)
    is_new = not path.exists()
    file = path.open("a", encoding="utf-8", buffering=1)
    if is_new and head:
        file.write(f"{head}\n")
    return file


def _lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return lines[:-1] if lines and not lines[-1].endswith("\n") else lines
