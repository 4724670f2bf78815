"""The options that a training script's own argument parser gets, and the config path read back from them."""

from __future__ import annotations

import argparse
from typing import Any

from shardline.errors import UsageError

__all__ = ["add_config_arguments", "config_path"]


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--shardline``, ``--shardline_config PATH`` and their DeepSpeed spellings; returns the same parser.

    The flag only informs the script (``args.shardline``, ``args.deepspeed``); the path is what
    ``initialize(args=args)`` reads where it gets no ``config``.
    """
    group = parser.add_argument_group("shardline", "distributed training")
    for name in ("shardline", "deepspeed"):
        group.add_argument(f"--{name}", action="store_true", help="train with the engine (read by the script alone)")
        group.add_argument(f"--{name}_config", metavar="PATH", help="the engine's configuration, a JSON file")
    return parser


def config_path(args: Any) -> str | None:
    """The config path in a parsed namespace, by either spelling; None where there is none.

    Raises:
        UsageError: both spellings are given and differ.
    """
    given = {name: getattr(args, name, None) for name in ("shardline_config", "deepspeed_config")}
    paths = {path for path in given.values() if path is not None}
    if len(paths) > 1:
        raise UsageError(
            f"Two configs were given: --shardline_config {given['shardline_config']} and "
            f"--deepspeed_config {given['deepspeed_config']}. They mean the same; give one."
        )
    return paths.pop() if paths else None
