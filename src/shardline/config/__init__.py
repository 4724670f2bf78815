"""The configuration: DeepSpeed's JSON as a typed, frozen tree, read strictly, with all problems reported at once."""

from shardline.config.load import load_config
from shardline.config.schema import Config

__all__ = ["Config", "load_config"]
