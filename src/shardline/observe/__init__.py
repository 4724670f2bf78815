"""Sinks for the event stream of a run."""

from shardline.observe.console import Console

__all__ = ["Console"]
