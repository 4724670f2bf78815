"""What a run says: sinks for the event stream, and memory readings."""

from shardline.observe.console import Console
from shardline.observe.memory import peak_bytes, resident_bytes

__all__ = ["Console", "peak_bytes", "resident_bytes"]
