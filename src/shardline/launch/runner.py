"""What each rank runs: the user's script, with an exception recorded for the launcher instead of printed by every rank.

python -m shardline.launch.runner [-m] SCRIPT ARGS...
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import re
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType

from shardline.errors import text_of
from shardline.runtime.ending import end_with, end_with_parent, record_exits_in

_LOSS = re.compile("Connection (closed|reset) by peer|Broken pipe|remote process exited|[Cc]ommunicator was aborted")
_CAUSE_SECONDS = 3.0  # from the loss of a peer, which is closing files and groups, to its own message
_EXIT_SECONDS = 30.0  # for a failed rank's exit handlers; a thread or destructor that waits for other ranks hangs there


def main(arguments: list[str]) -> None:
    """Run the script as if it were started by itself; its exit code is this process's."""
    end_with_parent()
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
        Path(f"{error_file}.pid").write_text(str(os.getpid()))
        record_exits_in(Path(error_file).parent)
        faulthandler.enable(open(f"{error_file}.crash", "w"))  # noqa: SIM115 (for the stacks at a segmentation fault)
    try:
        try:
            if is_module:
                runpy.run_module(target, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(target, run_name="__main__")
        except SystemExit as error:
            if _exit_code(error) != 0:
                raise
        saves = sys.modules.get("shardline.checkpoint.engine.background")
        if saves is not None:  # a save that failed in the background after the script's last statement makes it fail
            saves.finish()
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except BaseException as error:
        code = _exit_code(error)
        if code == 0 or not error_file:
            raise
        uncaught = sys.modules.get("shardline.watch.uncaught")
        if uncaught is not None:
            uncaught.tell(error)
        if _record(error, code, Path(error_file)):
            _wait_for_the_cause(Path(error_file).parent)
        faulthandler.dump_traceback_later(_EXIT_SECONDS, exit=True)
        sys.last_value = error  # as the interpreter does, which does not see this error
        end_with(code)
        raise SystemExit(code) from None


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit) and isinstance(error.code, int | None):
        return (error.code or 0) & 0xFF
    return 1


def _record(error: BaseException, code: int, file: Path) -> bool:
    """Write the error in torch elastic's format, with what the launcher needs to find the first failure.

    Returns:
        Whether another rank, which has not ended yet, is to blame.
    """
    now, gone, lost_peer = time.time(), _gone(file.parent), _is_loss_of_a_peer(error)
    if isinstance(error, SystemExit):
        said = "" if isinstance(error.code, int) else f": {error.code}"
        text = f"The script exited with code {code}{said}"
    elif _is_lost_rank(error):  # where it waited is in its sentence; the stack that helps is the other rank's
        text = f"{type(error).__name__}: {error}"
    else:
        trace: TracebackType | None = error.__traceback__
        while trace is not None and _is_machinery(trace) and trace.tb_next is not None:
            trace = trace.tb_next
        text = "".join(traceback.format_exception(type(error), error, trace))
    record = {
        "message": {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(now))}},
        "time": now,
        "code": code,
        "lost_peer": lost_peer,
        "gone": gone,
    }
    with contextlib.suppress(OSError):  # a full disk must not hide the error itself: the exit code still tells
        whole = file.with_suffix(".new")
        whole.write_text(json.dumps(record))
        whole.replace(file)  # a rank that is killed here leaves no half of it
    return lost_peer and not gone


def _wait_for_the_cause(folder: Path) -> None:
    """Give a rank that left its peers before it wrote its error the time to write it.

    The launcher ends all ranks when the first has ended.
    """
    deadline = time.monotonic() + _CAUSE_SECONDS
    while time.monotonic() < deadline and not _gone(folder):
        for file in folder.glob("*.json"):
            with contextlib.suppress(OSError, ValueError, LookupError):  # torch's own decorator writes there, too
                if not json.loads(file.read_text())["lost_peer"]:
                    return
        time.sleep(0.05)


def _gone(folder: Path) -> list[int]:
    """Ranks of this launcher that have ended or are ending: what they broke may be why this one fails.

    A process that ends is marked so before the kernel closes its sockets. Clocks could not tell: a rank that raises
    because another was killed may write down its time before the launcher has noticed the other's end.
    """
    if sys.platform != "linux":
        return []
    gone = []
    for file in folder.glob("*.pid"):
        with contextlib.suppress(ValueError):  # a rank that has just begun to write it
            pid = int(file.read_text())
            if _is_ending(pid):
                gone.append(pid)
    return gone


def _is_ending(pid: int) -> bool:
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return True
    PF_EXITING = 0x4
    return state in "ZX" or bool(int(fields[5]) & PF_EXITING)


def _is_loss_of_a_peer(error: BaseException) -> bool:
    """Whether all began with a message that a connection broke: the other end, still at its exit, failed before."""
    while not _is_lost_rank(error) and (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return _is_lost_rank(error) or _LOSS.search(text_of(error)) is not None


def _is_lost_rank(error: BaseException) -> bool:
    return type(error).__name__ == "LostRankError"


def _is_machinery(trace: TracebackType) -> bool:
    return trace.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>")


if __name__ == "__main__":
    main(sys.argv[1:])
