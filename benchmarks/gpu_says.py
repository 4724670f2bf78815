"""What the sections of ``gpu_first.py`` print, and what counts as a wait of the host for the device."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["attempt", "is_wait", "note", "verdict", "watched"]


def verdict(what: str, good: bool, found: object = "") -> None:
    print(f"{'ok' if good else 'FAILED'}: {what}" + (f": {found}" if str(found) else ""), flush=True)


def note(what: str) -> None:
    print(f"    {what}", flush=True)


@contextlib.contextmanager
def attempt(what: str) -> Iterator[None]:
    """An error within it is a verdict on ``what``, and the section goes on."""
    try:
        yield
    except Exception as error:
        places = traceback.extract_tb(error.__traceback__)[-6:]
        verdict(what, False, f"{type(error).__name__}: {str(error).strip()[:600]}")
        for place in reversed(places):
            note(f"{place.filename}:{place.lineno} {place.line}")


def is_wait(message: Warning | str) -> bool:
    """Whether CUDA's sync debug mode tells of a wait by it; the mode has a warning about itself, too."""
    return "called a synchronizing CUDA operation" in str(message)


@contextlib.contextmanager
def watched(found: Counter[str]) -> Iterator[None]:
    """Count in ``found`` the lines at which the host waits, by the warnings of CUDA's sync debug mode."""
    import torch

    def count(message: Warning | str, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if not is_wait(message):
            note(f"warning: {message}")
            return
        frames = [frame for frame in traceback.extract_stack()[:-1] if "shardline" in frame.filename]
        places = [f"{Path(frame.filename).name}:{frame.lineno} ({frame.line})" for frame in frames[:-4:-1]]
        found[" < ".join(places) or f"{filename}:{lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
