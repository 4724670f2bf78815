"""What each rank runs: the user's script, with an exception recorded for the launcher instead of printed by every rank.

python -m shardline.launch.runner [-m] SCRIPT ARGS...
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import io
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType

_EXIT_SECONDS = 30.0  # for a failed rank's exit handlers; a thread or destructor that waits for other ranks hangs there


def main(arguments: list[str]) -> None:
    """Run the script as if it were started by itself; its exit code is this process's."""
    _end_with_the_launcher()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whole lines, so that the launcher's prefixes do not cut into them
            stream.reconfigure(line_buffering=True)
    is_module = arguments[0] == "-m"
    target, *rest = arguments[1:] if is_module else arguments
    sys.argv = [target, *rest]
    # "python -m" has put the working directory first; a script expects its own directory there
    sys.path[0] = os.getcwd() if is_module else os.path.dirname(os.path.abspath(target))
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        faulthandler.enable(open(f"{error_file}.crash", "w"))  # noqa: SIM115 (for the stacks at a segmentation fault)
    try:
        try:
            if is_module:
                runpy.run_module(target, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(target, run_name="__main__")
        except SystemExit as error:
            if not _is_success(error):
                raise
        saves = sys.modules.get("shardline.checkpoint.background")
        if saves is not None:  # a save that failed since the script's last word is its failure
            saves.finish()
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except BaseException as error:
        if _is_success(error) or not error_file:
            raise
        code = _exit_code(error)
        _record(error, code, Path(error_file))
        faulthandler.dump_traceback_later(_EXIT_SECONDS, exit=True)
        raise SystemExit(code) from None


def _is_success(error: BaseException) -> bool:
    return isinstance(error, SystemExit) and error.code in (None, 0)


def _exit_code(error: BaseException) -> int:
    if not isinstance(error, SystemExit):
        return 1
    return error.code if isinstance(error.code, int) else 1


def _record(error: BaseException, code: int, file: Path) -> None:
    """Write the error in torch elastic's format, with the time in fractions of a second beside it."""
    now = time.time()
    if isinstance(error, SystemExit):
        said = "" if isinstance(error.code, int) else f": {error.code}"
        text = f"The script exited with code {code}{said}"
    else:
        trace: TracebackType | None = error.__traceback__
        while trace is not None and _is_machinery(trace) and trace.tb_next is not None:
            trace = trace.tb_next
        text = "".join(traceback.format_exception(type(error), error, trace))
    record = {
        "message": {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(now))}},
        "time": now,
    }
    with contextlib.suppress(OSError):  # a full disk must not hide the error itself: the exit code still tells
        file.write_text(json.dumps(record))


def _is_machinery(trace: TracebackType) -> bool:
    return trace.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>")


def _end_with_the_launcher() -> None:
    """Ask the kernel (Linux) to kill this process when the launcher dies, however it dies."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
