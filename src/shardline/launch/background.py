"""A function that runs on a thread for as long as a block does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["background"]


@contextmanager
def background(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Within it ``work`` runs on a daemon thread. The end of the block sets the event that it gets; it then returns."""
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
