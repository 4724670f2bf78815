"""Waits for what torch's loader ends without waiting, so that what is left behind after a test is really left."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def closed_queues_end() -> Iterator[None]:
    """The threads that feed the queues to the workers end some milliseconds after their queue was closed."""
    yield
    for thread in threading.enumerate():
        if thread.name == "QueueFeederThread":
            thread.join(timeout=5)
