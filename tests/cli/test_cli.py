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
    done = subprocess.run([sys.executable, "-m", name, "--version"], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, f"shardline {shardline.__version__}\n"), done.stderr


def test_help_does_not_wait_for_the_launcher():
    code = "import sys\nfrom shardline.cli import main\ntry: main(['run', '--help'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert "start a script" in done.stdout.lower(), done.stderr
    assert "torch.distributed.launcher.api" not in done.stdout.split()


WRONG = [
    ("run", "--master", "127.0.0.1:99999"),
    ("run", "--master", "a b"),
    ("run", "--master", "\x1b[31m:1:2"),
    ("run", "--master", "[::1"),
    ("run", "--max-restarts", "-1"),
    ("run", "--max-restarts", "9" * 5_000),
    ("run", "--max-restarts", "1e3"),
    ("run", "--log-dir", "/proc/x"),
    ("run", "--log-dir", "/dev/null"),
    ("run", "--log-dir", "a\0b"),
    ("run", "--log-dir", "x" * 5_000),
    ("run", "--nproc", "0"),
    ("run", "--nproc", "99999999"),
    ("run", "--nnodes", "0"),
    ("run", "--nnodes", "3:2"),
    ("run", "--nnodes", "1:999999999999", "--master", "a"),
    ("run", "--nnodes", "2"),
    ("run", "--node-rank", "1"),
    ("run", "--node-rank", "-1"),
    ("run", "--join-timeout", "nan"),
    ("run", "--join-timeout", "1e300"),
    ("run", "--join-timeout", "-1"),
    ("run", "--grace", "inf"),
    ("run", "--grace", "-0.1"),
    ("run", "--nnodes", "1:2", "--master", "127.0.0.1", "--secret-file", "/proc/x"),
    ("run", "--nnodes", "1:2", "--master", "127.0.0.1", "--secret-file", "/dev/null"),
    ("config", "schema", "/proc/x"),
    ("config", "schema", "/"),
    ("config", "schema", "a\0b"),
    ("config", "check", "/proc/x"),
    ("config", "check", "a\0b"),
    ("config", "check", "/dev/zero"),
    ("config", "explain", "/"),
    ("config", "explain", "\x1b[2J"),
    ("config", "check", "--world-size", "9" * 5_000, "a.json"),
    ("checkpoint", "inspect", "/proc/x"),
    ("checkpoint", "inspect", "/dev/zero"),
    ("checkpoint", "verify", "\x1b[2J"),
    ("checkpoint", "prune", "/proc/x", "--keep", "-1"),
    ("checkpoint", "list", "x" * 5_000),
    ("checkpoint", "inspect", "x" * 5_000),
    ("checkpoint", "verify", "x" * 5_000),
    ("checkpoint", "prune", "x" * 5_000, "--keep", "1"),
    ("config", "check", "x" * 5_000),
    ("config", "schema", "x" * 5_000),
    ("report", "x" * 5_000),
    ("report", "/proc/x"),
    ("report", "a\0b"),
    ("report", "\x1b[2J"),
]
SOUND = [
    ("--device", "cpu"),
    ("--max-restarts", "2"),
    ("--grace", "5"),
    ("--nproc", "2"),
    ("--join-timeout", "3"),
    ("-m",),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: ascii(" ".join(wrong))[:60])
def test_every_mistake_is_told_in_words_and_by_the_exit_code(capsys, tmp_path, monkeypatch, wrong):
    """49 mistakes, those of ``run`` also beside each of 6 sound options: nothing starts, and only words come out."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "script.py"
    script.touch()
    for sound in [(), *SOUND] if wrong[0] == "run" else [()]:
        command, *rest = wrong
        # the mistake comes last: it is the one that counts
        line = [command, *sound, *rest, str(script)] if command == "run" else [*wrong]
        try:
            code = main(line)
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr().err
        assert code in (1, 2), line
        assert said and all(char.isprintable() or char == "\n" for char in said), said
        assert len(said) < 12_000
