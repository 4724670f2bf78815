from __future__ import annotations

import subprocess
import sys

import pytest

import shardline
from shardline.cli import main


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"shardline {shardline.__version__}\n"


@pytest.mark.parametrize("command", ["run", "config"])
def test_commands_are_listed(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert f"    {command} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["run"], "SCRIPT"),
        (["run", "--nproc", "many", "x.py"], "'many' is neither a number nor auto"),
    ],
)
def test_mistakes_on_the_command_line(capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_errors_are_one_sentence(capsys):
    assert main(["run", "absent.py"]) == 2
    assert capsys.readouterr().err == (
        "shardline: There is no script 'absent.py'. Give the path of a Python file, or a module with -m.\n"
    )


def test_help_does_not_wait_for_the_launcher():
    code = "import sys\nfrom shardline.cli import main\ntry: main(['run', '--help'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "start a script" in done.stdout.lower(), done.stderr
    assert "torch.distributed.launcher.api" not in done.stdout.split()
