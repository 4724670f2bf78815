"""What a run says: sinks for the event stream."""

from shardline.observe.console import Console

__all__ = ["Console"]
