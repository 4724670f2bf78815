"""``shardline report``: one page of HTML about a run, from the log that it keeps. Needs neither torch nor a network."""

from __future__ import annotations

import argparse
from pathlib import Path

from shardline.errors import UsageError

__all__ = ["add_parser"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``report``."""
    text = "make one HTML page of a run: curves, time, memory, transfers, waiting, configuration, checkpoints"
    parser = subparsers.add_parser("report", help=text, description=text)
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="the folder of run_log.dir, which holds events.jsonl")
    parser.add_argument("--out", type=Path, help="file to write (default: RUN_DIR/report.html)")
    parser.add_argument("--png", action="store_true", help="the curves as pictures beside it; needs matplotlib")
    parser.set_defaults(func=_report)


def _report(args: argparse.Namespace) -> int:
    from shardline.observe.report import page, read

    record = read(args.run)
    folder = args.run if args.run.is_dir() else args.run.parent
    out = args.out or folder / "report.html"
    written = [out]
    try:
        out.write_text(page(record), encoding="utf-8")
        if args.png:
            from shardline.observe.report.pictures import draw

            written += draw(record, out.with_suffix(""))
    except OSError as error:
        raise UsageError(f"cannot write {out}: {(error.strerror or str(error)).lower()}.") from None
    for path in written:
        print(path)
    return 0
