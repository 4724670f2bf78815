"""The report of a run: from its log to one page that needs nothing else."""

from shardline.observe.report.page import page
from shardline.observe.report.record import Record, read

__all__ = ["Record", "page", "read"]
