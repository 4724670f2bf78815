"""``deepspeed.checkpoint.ds_to_universal``: any layout loads any checkpoint, so a universal one is a copy."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardline.errors import CheckpointError

__all__ = ["main"]


def main(args: Any = None) -> None:
    """Copy the checkpoint ``args.input_folder`` to ``args.output_folder``. Without ``args`` those of the command line.

    Raises:
        CheckpointError: there is no input, or the output is there already.
    """
    args = parse_arguments() if args is None else args
    source, target = Path(args.input_folder), Path(args.output_folder)
    if not source.is_dir():
        raise CheckpointError(f"There is no checkpoint {source}. Give the folder of one, such as DIR/global_step100.")
    if target.exists():
        raise CheckpointError(f"{target} is there already. Give another output folder.")
    shutil.copytree(source, target)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """``--input_folder`` and ``--output_folder``; other options of DeepSpeed's tool have no effect."""
    parser = argparse.ArgumentParser(description="Copy a checkpoint; any number of ranks loads it as it is.")
    parser.add_argument("--input_folder", required=True)
    parser.add_argument("--output_folder", required=True)
    return parser.parse_known_args(arguments)[0]
