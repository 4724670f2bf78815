"""Storage reader and writer for ``torch.distributed.checkpoint``: the public names of ``foreign/interchange.py``."""

from shardline.checkpoint.foreign.interchange import Reader, Writer, state_of

__all__ = ["Reader", "Writer", "state_of"]
