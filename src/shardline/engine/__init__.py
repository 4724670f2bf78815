"""The engine that people call: the loop, what is trained, and how it is made."""

from shardline.engine.engine import Engine, StepHook

__all__ = ["Engine", "StepHook"]
