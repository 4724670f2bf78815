"""The options of DeepSpeed's launcher."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from shardline.cli import main
from shardline.compat.deepspeed import launching
from shardline.compat.deepspeed.finder import PATH
from tests.compat.rows import differs, unchanged


@pytest.fixture
def started(monkeypatch):
    from shardline.launch import run

    jobs = []
    monkeypatch.setattr(run, "launch", lambda job: jobs.append(job) or 0)

    def start(*arguments):
        assert main(["run", *map(str, arguments)]) == 0
        return jobs.pop()

    return start


@unchanged("the launcher", "`--num_gpus`, `--master_port`, `--module`, `--no_local_rank`, `--local_rank`")
@differs("`--bind_cores_to_rank`", "binds", "accepted with a notice: each rank gets its share of threads")
def test_scripts_find_the_stand_in_and_get_their_local_rank(started, capsys):
    job = started("--as-deepspeed", "--num_gpus", 2, "--master_port", 29501, "train.py", "--deepspeed")
    assert (job.script, job.arguments, job.nproc) == ("train.py", ("--local_rank=${local_rank}", "--deepspeed"), 2)
    assert job.environment["PYTHONPATH"].split(os.pathsep)[0] == PATH
    assert launching.ANNOUNCEMENT in capsys.readouterr().err
    job = started("--no_local_rank", "--bind_cores_to_rank", "--as-deepspeed", "--module", "pkg.train", "-x")
    assert (job.arguments, job.module) == (("-x",), True)
    assert "not bound to cores" in capsys.readouterr().err
    assert "PYTHONPATH" not in started("train.py").environment


@unchanged("the launcher", "`--num_nodes`, `--include`, `--exclude`, `--hostfile`, `--node_rank`, `--master_addr`")
def test_hosts_and_slots(started, tmp_path, monkeypatch):
    hosts = tmp_path / "hosts"
    hosts.write_text("# two\nworker-0 slots=4\nworker-1 slots=4\n")
    job = started("--as-deepspeed", "--include", "localhost:0,1,3", "x.py")
    assert (job.nproc, job.nnodes, "CUDA_VISIBLE_DEVICES" in job.environment) == (3, 1, False)
    job = started("--as-deepspeed", "-H", hosts, "-i", "worker-1:0,2", "x.py")
    assert (job.nproc, job.nnodes, job.master) == (2, 1, None)
    job = started("--as-deepspeed", "-H", hosts, "-e", "worker-0", "x.py")
    assert (job.nproc, job.nnodes) == (4, 1)
    job = started("--as-deepspeed", "-H", hosts, "--no_ssh", "--node_rank", 1, "--master_addr", "h", "x.py")
    assert (job.nproc, job.nnodes, job.node_rank, job.master) == (4, 2, 1, "h")
    job = started("--as-deepspeed", "--num_nodes", 2, "--num_gpus", 4, "--node_rank", 1, "--master_addr", "h", "x.py")
    assert (job.nproc, job.nnodes, job.node_rank, job.master) == (4, 2, 1, "h")
    monkeypatch.setattr(launching.get_accelerator().__class__, "is_available", lambda self: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    job = started("--as-deepspeed", "-H", hosts, "-i", "worker-0:1,3", "x.py")
    assert job.environment["CUDA_VISIBLE_DEVICES"] == "5,7"


@differs(
    "`--hostfile` of several hosts",
    "starts all of them by ssh",
    "start the command on each, with `--no_ssh --node_rank R --master_addr HOST`",
)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hostfile", "absent"], "Cannot read --hostfile absent"),
        (["--hostfile", "hosts"], "2 hosts are chosen (a, b), and this command starts processes on its own host alone"),
        (["--hostfile", "hosts", "--include", "c"], "--include names host 'c', and there are: a, b"),
        (["--hostfile", "hosts", "--include", "a:x"], "--include is 'a:x'"),
        (["--hostfile", "hosts", "--exclude", "a:7"], "--exclude names slot 7 of a, which has 2"),
        (["--hostfile", "hosts", "--exclude", "a@b"], "leaves no slot"),
        (["--hostfile", "hosts", "--include", "a:0@b", "--no_ssh"], "different numbers of slots"),
        (["--hostfile", "hosts", "--include", "a", "--exclude", "b"], "both given"),
        (["--hostfile", "hosts", "--include", "a", "--num_gpus", "1"], "--num_gpus is 1, and 2 slots"),
        (["--hostfile", "hosts", "--no_ssh", "--node_rank", "2", "--num_nodes", "3"], "--node_rank is 2"),
        (["--hostfile", "bad"], "line 1 is 'a 2'"),
        (["--hostfile", "empty"], "names no host"),
    ],
)
def test_mistakes(capsys, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    (tmp_path / "bad").write_text("a 2\n")
    (tmp_path / "empty").write_text("\n")
    assert main(["run", "--as-deepspeed", *arguments, "x.py"]) == 2
    assert words in capsys.readouterr().err


SCRIPT = """
import os, sys
import deepspeed, importlib.metadata
print(sys.argv[1:], [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")],
      deepspeed.__name__, importlib.metadata.version("deepspeed"))
"""


def test_a_script_alone(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "shardline.compat.deepspeed"]
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [*command, str(script), "--a", "b"], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout == "['--a', 'b'] ['0', '1', '0'] shardline.compat.deepspeed 0.19.8\n", done.stderr
    assert done.stderr == f"shardline: {launching.ANNOUNCEMENT}\n"
    done = subprocess.run([*command, "absent.py"], env=environment, capture_output=True, text=True, timeout=200)
    assert (done.returncode, "There is no script 'absent.py'" in done.stderr) == (1, True)
