"""The end of a process that failed while it had a process group.

A thread of gloo that drops a tensor needs the interpreter. One that asks for it while the interpreter is torn down is
ended by CPython, and C++ then aborts the process: SIGABRT instead of the exit code. After an error the groups
cannot be ended first, since that waits for collectives which other ranks may never join. So such a process runs
everything that runs at exit, flushes its files, and ends without a teardown.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import io
import os
import signal
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from weakref import WeakSet

__all__ = [
    "GO_ON",
    "end_after_uncaught_errors",
    "end_with",
    "end_with_parent",
    "has_failed",
    "note_lost_ranks",
    "record_exit",
    "record_exits_in",
    "recorded_exit",
]

GO_ON = 75
"""The exit code of a job that was asked to end and has saved: start it again. EX_TEMPFAIL of sysexits.h."""


def end_with_parent() -> None:
    """Ask the kernel (Linux) to kill this process when the thread that started it ends, however it ends."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


_FOLDERS: list[Path] = []


def record_exits_in(folder: Path) -> None:
    """The launcher shows what ranks write down in ``folder`` of one that ended without a word."""
    _FOLDERS[:] = [folder]


def record_exit(pid: int, sentence: str) -> bool:
    """Write down how process ``pid``, another rank, ended; False where no launcher would show it."""
    with suppress(OSError):
        for folder in _FOLDERS:
            whole = folder / f"{pid}.{os.getpid()}"
            whole.write_text(sentence, encoding="utf-8", errors="backslashreplace")
            whole.replace(folder / f"{pid}.exit")  # a rank that is ended here leaves no half of it
            return True
    return False


def recorded_exit(pid: int, folder: Path) -> str:
    """What another rank wrote down in ``folder`` of the end of process ``pid``."""
    with suppress(OSError):
        return (folder / f"{pid}.exit").read_text(encoding="utf-8")
    return ""


_LOST: WeakSet[object] = WeakSet()


def note_lost_ranks(owner: object, *, lost: bool) -> None:
    """Whether ``owner`` began something with ranks that will not come: the end of the process does not wait for it."""
    if lost:
        _LOST.add(owner)
    else:
        _LOST.discard(owner)


def has_failed() -> bool:
    """Whether an error ends this process, or is to end it, or other ranks will not come any more."""
    return bool(_LOST) or getattr(sys, "last_value", None) is not None


def end_with(code: int) -> None:
    """End the process with ``code`` behind all exit handlers, without a teardown, if it has a process group then.

    To be called when the interpreter is about to exit with that code. Without a group it does so by itself.
    """
    atexit.register(_end, code)  # the newest handler is called first


def _end(code: int) -> None:
    # `python -i` goes on after an error, so this is another end
    if hasattr(sys, "ps1") or not _has_group():
        return
    atexit.unregister(_end)
    atexit._run_exitfuncs()  # all the others
    _flush()
    os._exit(code)


def _has_group() -> bool:
    distributed = sys.modules.get("torch.distributed")  # not imported for this
    return distributed is not None and distributed.is_available() and bool(distributed.is_initialized())


def _flush() -> None:
    """Flush what a teardown would: files that the script left open, then Python's streams and C's."""
    kinds = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
    files = [each for each in gc.get_objects() if issubclass(type(each), kinds)]
    for file in [*files, sys.stdout, sys.stderr]:
        with suppress(Exception):  # closed, a broken pipe, a full disk: another error ends the process
            file.flush()
    with suppress(AttributeError):  # Windows
        ctypes.pythonapi.fflush(None)


@cache
def end_after_uncaught_errors() -> None:
    """From now on use :func:`end_with` when an uncaught error ends the script."""
    earlier = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        earlier(kind, error, trace)
        # The interpreter notes what ends it; a script that prints an error by this hook does not. After an interrupt
        # the process ends by that signal.
        if error is getattr(sys, "last_value", None) and not isinstance(error, KeyboardInterrupt):
            end_with(1)

    sys.excepthook = hook
