"""The configuration: DeepSpeed's JSON as a typed, frozen tree, read strictly, with every problem told at once."""

from shardline.config.load import load_config
from shardline.config.schema import Config

__all__ = ["Config", "load_config"]
