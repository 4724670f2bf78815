"""Checkpoints by name and range: written by all ranks, committed at one point, read by any layout, never unpickled.

Public is :mod:`shardline.checkpoint.interchange`; the rest is reached through the engine and ``shardline checkpoint``.
Nothing is imported here: a look at a directory of checkpoints must not cost an import of torch.
"""
