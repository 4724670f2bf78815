"""Training data: one sequence of global batches, split over ranks, with a position that is a value."""

from shardline.data.loader import Loader, length
from shardline.data.split import Position

__all__ = ["Loader", "Position", "length"]
