"""The ``shardline`` command: its subcommands, and errors as one sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from shardline._version import __version__
from shardline.errors import ShardlineError, shown

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (2 for a mistake on the command line, as argparse does)."""
    from shardline.cli import checkpoint, config, doctor, report, run

    parser = argparse.ArgumentParser(prog="shardline", description="Sharded, mixed-precision, distributed training.")
    parser.add_argument("--version", action="version", version=f"shardline {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    run.add_parser(commands)
    config.add_parser(commands)
    checkpoint.add_parser(commands)
    report.add_parser(commands)
    doctor.add_parser(commands)
    parsed = parser.parse_args(arguments)
    try:
        code: int = parsed.func(parsed)
        return code
    except ShardlineError as error:
        print(f"shardline: {error}", file=sys.stderr)
    except OSError as error:  # of a path that was given, or of the output: a full disk, a closed pipe
        where = "" if error.filename is None else f": {shown(error.filename, 200)}"
        print(f"shardline: {error.strerror or error}{where}.", file=sys.stderr)
    return 2
