"""Checkpoints by name and range: written by all ranks, committed at one point, read by any layout, never unpickled."""

from __future__ import annotations

from shardline.checkpoint.checkpointer import Checkpointer
from shardline.checkpoint.parts import Parts
from shardline.checkpoint.window import WindowStart

__all__ = ["Checkpointer", "Parts", "WindowStart"]
