"""Sharded training: units and their buffers, gathers and reductions, hooks, the accumulation window and its step."""
