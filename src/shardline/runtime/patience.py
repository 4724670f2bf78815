"""Waits for others to come: it is said every ten seconds for what and until when, and the user sets the limit."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from shardline.errors import LaunchError

__all__ = ["Patience"]

_WORD_SECONDS = 10.0  # processes of one job usually start within seconds of each other
_NAP, _LONGEST_NAP = 0.05, 1.0  # seconds between two looks


class Patience:
    """Waits in steps, says what it waits for, and raises at its limit.

    Args:
        seconds: the limit, from now on.
        key: what the user sets that by.
        speaker: what lines begin with; empty: nothing is said.
        sleep: for so many seconds.
    """

    def __init__(self, seconds: float, key: str, speaker: str, sleep: Callable[[float], object] = time.sleep) -> None:
        self._seconds, self._key, self._speaker = seconds, key, speaker
        self._begin, self._until = time.monotonic(), time.time() + seconds
        self._word = _WORD_SECONDS
        self._sleep, self._nap = sleep, _NAP

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self._begin + self._seconds - time.monotonic()

    @property
    def wants_words(self) -> bool:
        """Whether the next :meth:`wait` says why, or raises."""
        waited = self._seconds - self.left
        return waited > self._seconds or (bool(self._speaker) and waited > self._word)

    def wait(self, why: str) -> None:
        """Wait a little. ``why`` is a sentence without its end that names what is missing.

        Raises:
            LaunchError: the limit has passed.
        """
        if self.left < 0:
            raise LaunchError(f"{why[0].upper()}{why[1:]} in {self._seconds:g} s ({self._key}).")
        if self.wants_words:
            self._word += _WORD_SECONDS
            until = time.strftime("%H:%M:%S", time.localtime(self._until))
            sys.stderr.write(f"{self._speaker}: {why} yet; waiting until {until} ({self._key}).\n")
            sys.stderr.flush()
        self._sleep(min(self._nap, max(0.0, self.left) + _NAP))
        self._nap = min(2 * self._nap, _LONGEST_NAP)
