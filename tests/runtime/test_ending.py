"""After an error a process with a group runs what runs at exit, and ends without a teardown of the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import atexit, os, sys
atexit.register(print, "registered first")
import torch.distributed as dist, shardline

class Global:
    def __del__(self):
        print("torn down")

kept = Global()
table = open(os.environ["TABLE"], "w")
table.write("a row")
if os.environ["GROUP"] == "here":
    shardline.init_distributed()
elif os.environ["GROUP"] == "script's":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
atexit.register(print, "registered last")
"""

PRINTED = "registered last\nregistered first\n"


def run(tmp_path: Path, end: str, group: str = "here", *options: str, **kwargs: str) -> tuple[int, str, str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + end)
    done = subprocess.run(
        [sys.executable, *options, str(script)],
        env={**os.environ, "TABLE": str(tmp_path / "table"), "GROUP": group, **kwargs},
        input="print(1 + 1)\n",
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (tmp_path / "table").read_text() == "a row"
    return done.returncode, done.stdout, done.stderr


def test_an_uncaught_error_ends_a_process_with_a_group_without_a_teardown(tmp_path: Path) -> None:
    code, out, err = run(tmp_path, "raise ValueError('mine')")
    assert (code, out) == (1, PRINTED)
    assert err.endswith("ValueError: mine\n") and err.count("Traceback") == 1


@pytest.mark.parametrize(
    ("end", "group", "code"),
    [
        ("raise SystemExit(3)", "here", 3),
        ("raise ValueError", "none", 1),
        # what prints an error in the interpreter's way is not an end: another program may do so, and go on
        ("try: 1 / 0\nexcept ZeroDivisionError: sys.excepthook(*sys.exc_info())", "here", 0),
    ],
    ids=["exit", "no group", "an error that was printed"],
)
def test_every_other_end_is_the_interpreters(tmp_path: Path, end: str, group: str, code: int) -> None:
    assert run(tmp_path, end, group)[:2] == (code, PRINTED + "torn down\n")


def test_an_interactive_session_goes_on_after_an_error(tmp_path: Path) -> None:
    code, out, _ = run(tmp_path, "raise ValueError('mine')", "here", "-i")
    assert (code, out) == (0, "2\n" + PRINTED + "torn down\n")


@pytest.mark.parametrize(
    ("end", "group", "code"),
    [("raise ValueError('mine')", "here", 1), ("sys.exit(7)", "script's", 7)],
    ids=["error", "exit"],
)
def test_a_rank_of_the_launcher_keeps_its_exit_code(tmp_path: Path, end: str, group: str, code: int) -> None:
    record = tmp_path / "rank0.json"
    options = "-m", "shardline.launch.runner"
    assert run(tmp_path, end, group, *options, TORCHELASTIC_ERROR_FILE=str(record)) == (code, PRINTED, "")
    assert json.loads(record.read_text())["code"] == code
