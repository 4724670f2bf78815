"""Who waits for whom: each rank writes down what it does, and a thread reads that when nothing moves.

Nothing here sends a message while all goes well, and nothing waits for a device.
"""

from __future__ import annotations

from shardline.watch.status import CHANNELS, Status
from shardline.watch.watch import Channel, Ticket, Watch, WatchSettings
from shardline.watch.watchdog import Watchdog
from shardline.watch.words import Operation, Phase

__all__ = ["CHANNELS", "Channel", "Operation", "Phase", "Status", "Ticket", "Watch", "WatchSettings", "Watchdog"]
