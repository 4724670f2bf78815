"""Checkpoints by name and range: written by all ranks, committed at one point, read by any layout, never unpickled.

Nothing is imported here: looking at a directory of checkpoints must not cost an import of torch.
"""
