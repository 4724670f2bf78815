"""The progress bar: on a terminal it is redrawn in place, elsewhere it is a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

from shardline.events import Event, StepDone, StepSkipped
from shardline.observe.sink import Run, Sink

__all__ = ["ProgressBar"]

_SECONDS = 10.0  # between two lines
_FORM = "{percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_FORM_WITHOUT_TOTAL = "{n_fmt} steps [{elapsed}, {rate_fmt}{postfix}]"


class ProgressBar(Sink):
    """Shows steps done, loss and speed on the standard error stream.

    Args:
        total: steps of the whole run, where known.
    """

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._bar: Any = None
        self._shown = 0.0
        self._samples, self._seconds = 0, 0.0

    def open(self, run: Run) -> None:
        self._shown = time.monotonic()
        if sys.stderr.isatty():
            from tqdm import tqdm

            form = _FORM if self._total else _FORM_WITHOUT_TOTAL
            self._bar = tqdm(total=self._total, initial=run.step, unit="step", bar_format=form, dynamic_ncols=True)

    def receive(self, event: Event) -> None:
        if isinstance(event, StepDone | StepSkipped) and self._bar is not None:
            self._bar.update(event.step - self._bar.n)
        if not isinstance(event, StepDone):
            return
        self._samples, self._seconds = self._samples + event.samples, self._seconds + event.seconds
        now = time.monotonic()
        if now - self._shown < (0.25 if self._bar is not None else _SECONDS):
            return
        self._shown = now
        text = self._text(event)
        self._samples, self._seconds = 0, 0.0
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
        else:
            steps = f"step {event.step}" + (f" of {self._total}" if self._total else "")
            sys.stderr.write(f"{steps}, {text}\n")

    def _text(self, event: StepDone) -> str:
        parts = [] if event.loss is None else [f"loss {event.loss:.4f}"]
        if self._seconds > 0:
            parts.append(f"{self._samples / self._seconds:,.1f} samples/s")
        return ", ".join(parts)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
