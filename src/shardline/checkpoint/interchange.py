"""The public names of ``checkpoint/foreign/interchange.py``, for ``torch.distributed.checkpoint``."""

from shardline.checkpoint.foreign.interchange import Reader, Writer, state_of

__all__ = ["Reader", "Writer", "state_of"]
