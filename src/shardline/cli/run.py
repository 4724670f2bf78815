"""``shardline run``: start a training script on the processes of this node."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_parser"]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "run",
        help="start a script on several processes",
        usage="shardline run [options] SCRIPT [ARGS ...]\n       shardline run [options] -m MODULE [ARGS ...]",
        description="Start a script on several processes. Rank 0 writes to the terminal, lines of the other ranks are "
        "prefixed. If a rank fails, the others are ended and the first failing rank's traceback is printed last; its "
        "exit code is the command's.",
    )
    parser.add_argument(
        "--nproc",
        type=_nproc,
        metavar="N|auto",
        help="processes on this node; auto (default): one per accelerator, else 1",
    )
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="number of nodes (default 1)")
    parser.add_argument("--node-rank", type=int, default=0, metavar="R", help="number of this node, from 0")
    parser.add_argument("--master", metavar="HOST[:PORT]", help="address of node 0; needed with several nodes")
    parser.add_argument("--log-dir", type=Path, metavar="DIR", help="write each rank's output to files in DIR")
    parser.add_argument("--max-restarts", type=int, default=0, metavar="N", help="start again after a failure, N times")
    parser.add_argument(
        "--grace",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="from a SIGTERM until ranks are killed; a step and a save must fit into it (default 600; Ctrl-C: 5)",
    )
    parser.add_argument("-m", "--module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS")
    parser.set_defaults(func=_main)


def _nproc(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def _main(parsed: argparse.Namespace) -> int:
    from shardline.launch.run import Launch, launch  # torch takes seconds to import: not for --help

    return launch(
        Launch(
            parsed.script,
            tuple(parsed.arguments),
            parsed.module,
            parsed.nproc,
            parsed.nnodes,
            parsed.node_rank,
            parsed.master,
            parsed.log_dir,
            parsed.max_restarts,
            parsed.grace,
        )
    )
