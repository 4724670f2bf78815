"""The rows of docs/migrate-from-deepspeed.md stand at the tests that hold them; ``document`` makes the page of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["DIFFERENCES", "UNCHANGED", "Difference", "Unchanged", "differs", "unchanged"]

Test = TypeVar("Test", bound=Callable[..., Any])


@dataclass(frozen=True)
class Unchanged:
    """What a test has run unchanged.

    Attributes:
        client: whose code it is; rows of one client are one row of the page.
        tried: what of it.
        test: file and name of the test.
        line: where it stands.
    """

    client: str
    tried: str
    test: str
    line: int


@dataclass(frozen=True)
class Difference:
    """What a test has seen to differ: what it is about, in DeepSpeed, here; then as above."""

    what: str
    there: str
    here: str
    test: str
    line: int


UNCHANGED: list[Unchanged] = []
DIFFERENCES: list[Difference] = []


def unchanged(client: str, tried: str) -> Callable[[Test], Test]:
    """The test shows that ``tried`` of ``client`` runs unchanged."""

    def mark(test: Test) -> Test:
        UNCHANGED.append(Unchanged(client, tried, *_place(test)))
        return test

    return mark


def differs(what: str, there: str, here: str) -> Callable[[Test], Test]:
    """The test shows that ``what`` is ``here`` where DeepSpeed has ``there``."""

    def mark(test: Test) -> Test:
        DIFFERENCES.append(Difference(what, there, here, *_place(test)))
        return test

    return mark


def _place(test: Callable[..., Any]) -> tuple[str, int]:
    return f"{test.__module__.rpartition('.')[2]}.py::{test.__name__}", test.__code__.co_firstlineno
