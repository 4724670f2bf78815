from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
        (["run", "--nnodes", "1:x", "x.py"], "'1:x' is neither a number nor MIN:MAX"),
        (["run", "--include", "localhost:0,1", "x.py"], "no --include here: CUDA_VISIBLE_DEVICES chooses"),
        (["run", "-e=localhost:0", "x.py"], "no -e here: CUDA_VISIBLE_DEVICES chooses"),
        (["run", "--hostfile", "hosts", "x.py"], "no --hostfile here: start this command on every node, with --nnodes"),
        (["run", "--rdzv_endpoint=a:1", "x.py"], "no --rdzv_endpoint here: --master HOST:PORT says"),
        (["run", "--standalone", "x.py"], "no --standalone here"),
    ],
)
def test_mistakes_on_the_command_line(capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (["--num_gpus", "2"], {"nproc": 2}),
        (["--nproc_per_node", "2"], {"nproc": 2}),
        (["--nproc-per-node=gpu"], {"nproc": None}),
        (["--device", "cpu"], {"device": "cpu"}),
        (["--num_nodes", "2", "--node_rank", "1", "--master_addr", "a"], {"nnodes": 2, "node_rank": 1, "master": "a"}),
        (["--nnodes", "2:4"], {"nnodes": 2, "max_nnodes": 4}),
        (["--master_port", "29501"], {"master": "127.0.0.1:29501"}),
        (["--master_port", "29501", "--master-addr", "::1"], {"master": "[::1]:29501"}),
        (["--nnodes", "2", "--master_port", "29501"], {"master": None}),  # which says that an address is missing
        (["--log_dir", "logs", "--max_restarts", "3"], {"log_dir": Path("logs"), "max_restarts": 3}),
    ],
)
def test_words_of_other_launchers_are_understood(monkeypatch, arguments, given):
    from shardline.launch import run

    jobs = []
    monkeypatch.setattr(run, "launch", lambda job: jobs.append(job) or 0)
    assert main(["run", *arguments, "x.py", "--num_gpus", "9"]) == 0
    (job,) = jobs
    assert (job.script, job.arguments) == ("x.py", ("--num_gpus", "9"))
    assert {name: getattr(job, name) for name in given} == given


def test_a_file_that_cannot_be_written(capsys):
    assert main(["config", "schema", "/proc/x"]) == 2
    assert capsys.readouterr().err == "shardline: Cannot write /proc/x: No such file or directory. [SL201]\n"


def test_errors_are_one_sentence(capsys):
    assert main(["run", "absent.py"]) == 2
    assert capsys.readouterr().err == (
        "shardline: There is no script 'absent.py'. Give the path of a Python file, or a module with -m. [SL901]\n"
    )


@pytest.mark.parametrize("name", ["shardline", "shardline.cli"])
def test_as_a_module(name):
    done = subprocess.run([sys.executable, "-m", name, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"shardline {shardline.__version__}\n"), done.stderr


def test_help_does_not_wait_for_the_launcher():
    code = "import sys\nfrom shardline.cli import main\ntry: main(['run', '--help'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "start a script" in done.stdout.lower(), done.stderr
    assert "torch.distributed.launcher.api" not in done.stdout.split()
