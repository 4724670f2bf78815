"""Observing a run: sinks for the event stream, the report of a run, and the table of an engine."""

from shardline.observe.console import Console
from shardline.observe.registry import register
from shardline.observe.sink import Run, Sink

__all__ = ["Console", "Run", "Sink", "register"]
