"""Moments of a device: taking one waits for nothing, and the time between two is known once the device is there."""

from __future__ import annotations

import time

import torch

__all__ = ["Moment", "now", "seconds_between"]

Moment = float | torch.Event
"""Of the host's clock in seconds, or in the current stream of a device."""


def now(device: torch.device) -> Moment:
    """The moment at which ``device`` has done what it was given so far."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record(torch.accelerator.current_stream(device))
    return event


def seconds_between(begin: Moment, end: Moment, *, wait: bool = False) -> float | None:
    """Seconds from ``begin`` to ``end``; None if the device has not reached ``end`` yet, unless ``wait`` is set."""
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    if isinstance(begin, float) or isinstance(end, float):
        raise AssertionError("two moments of different clocks")
    if wait:
        end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 if wait or end.query() else None
