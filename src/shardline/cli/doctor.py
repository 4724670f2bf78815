"""``shardline doctor``: whether this machine is fit to train, a verdict on each line."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from shardline.cli.values import positive
from shardline.errors import LostRankError, ShardlineError, text_of

if TYPE_CHECKING:
    from shardline.doctor import Check, Verdict

__all__ = ["add_parser"]

_SECONDS = 55.0
"""For everything: what is left then has failed."""
_EACH = 20.0
"""For one check; the first may wait for processes that start."""

Measure = Callable[["Check", float], list[Any]]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``doctor``."""
    text = "check whether this machine is fit to train: one verdict on each line; exit code 1 if anything failed"
    parser = subparsers.add_parser(
        "doctor",
        help=text,
        description=f"{text}. Between hosts: start `-m shardline doctor` by `shardline run` or torchrun.",
    )
    parser.add_argument("--nproc", type=positive, metavar="N", help="ranks (default: one per accelerator, else 2)")
    parser.set_defaults(func=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from shardline.doctor import checks  # torch takes seconds to import: not for --help
    from shardline.runtime.environment import read_launcher
    from shardline.runtime.topology import accelerators

    launched = read_launcher()
    place = _launched_ranks() if launched.launcher else _new_ranks(args.nproc or accelerators().count or 2)
    with place as (measure, speaks):
        return 0 if _examine(checks(), measure, speaks) else 1


def _examine(checks: list[Check], measure: Measure, speaks: bool) -> bool:
    """Run all checks, and print where this process ``speaks``. Returns whether none failed."""
    from shardline.doctor.verdict import FAILED, Verdict

    found: dict[str, Any] = {}
    width = max(len(check.what) for check in checks)
    deadline, failed = time.monotonic() + _SECONDS, False
    for check in checks:
        left = min(_EACH, deadline - time.monotonic())
        verdict: Verdict
        try:
            if left < 1:
                raise LostRankError(f"no time was left after {_SECONDS:g} s.")
            found[check.what] = values = measure(check, left)
            verdict = check.judge(values, found)
        except Exception as error:
            verdict = Verdict(FAILED, _sentence(error))
        failed = failed or verdict.state == FAILED
        if speaks:
            print(f"{check.what:<{width}}  {verdict}", flush=True)
    return not failed


def _sentence(error: Exception) -> str:
    """One line: of a rank's report the rank and its own error, without the traceback."""
    from shardline.testing import RankFailed

    if isinstance(error, RankFailed):
        own = error.error
        if own is None:
            return error.message.splitlines()[0]
        return f"rank {error.rank}: {_sentence(own) if isinstance(own, Exception) else repr(own)}"
    text = text_of(error) if isinstance(error, ShardlineError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


@contextmanager
def _new_ranks(nproc: int) -> Iterator[tuple[Measure, bool]]:
    """Ranks on this host, which end with the command. A rank that hangs costs a check, and not the others."""
    from shardline.testing import Pool

    with Pool(nproc, preload=("shardline.doctor",)) as pool:

        def measure(check: Check, left: float) -> list[Any]:
            if check.alone:
                return [check.measure(*check.arguments)]
            pool.start_timeout = left
            return pool.run(check.measure, *check.arguments, timeout=left)

        yield measure, True


@contextmanager
def _launched_ranks() -> Iterator[tuple[Measure, bool]]:
    """The ranks of the job that this process is one of. A rank that hangs ends the examination."""
    import torch.distributed as dist

    from shardline.comm.exchange import all_gather_json
    from shardline.runtime.process_group import init_distributed

    init_distributed(timeout=timedelta(seconds=_EACH))
    group = dist.group.WORLD
    if group is None:
        raise AssertionError("a process group was made")

    def measure(check: Check, left: float) -> list[Any]:
        value, wrong = None, ""
        try:
            value = check.measure(*check.arguments)
        except Exception as error:
            wrong = _sentence(error)
        found = all_gather_json([value, wrong], group)
        for rank, (_, text) in enumerate(found):
            if text:
                raise LostRankError(f"rank {rank}: {text}")
        return [value for value, _ in found]

    yield measure, dist.get_rank() == 0
