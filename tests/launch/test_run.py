from __future__ import annotations

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from shardline.cli import main
from shardline.errors import LaunchError
from shardline.launch.run import Launch, _happened_at, _Logs, launch

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # see gc.collect() below
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

LIMIT = 90  # seconds for one run; usual are 2 to 4


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs the command in this process, which has paid for importing torch; the ranks are real processes."""
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_SIGNALS_TO_HANDLE"):  # what the launcher may set
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def call(*arguments):
        code = main(["run", *map(str, arguments)])
        gc.collect()  # torch's agent leaves the files it opened to the garbage collector
        return Done(code, *capfd.readouterr())

    return call


@pytest.fixture
def script(tmp_path):
    """Writes a script; ``rank`` is defined in it. Scripts without torch start in no time."""

    def write(body, name="script.py"):
        file = tmp_path / name
        file.write_text(f"import os, sys, time\nrank = int(os.environ['RANK'])\n{body}\n")
        return file

    return write


def test_two_ranks_form_a_group_and_rank_one_is_prefixed(run, script):
    file = script(
        "import torch, torch.distributed as dist, shardline\n"
        "shardline.init_distributed()\n"
        "total = torch.ones(1)\n"
        "dist.all_reduce(total)\n"
        "print(rank, total.item(), sys.argv[1:], os.environ['OMP_NUM_THREADS'], __name__)\n"
        "print('complaint', file=sys.stderr)\n"
    )
    done = run("--nproc", 2, file, "--flag", "value", "-m")
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    line = f"2.0 ['--flag', 'value', '-m'] {threads} __main__"
    assert sorted(done.stdout.splitlines()) == [f"0 {line}", f"[rank 1] 1 {line}"]
    assert sorted(done.stderr.splitlines()) == ["[rank 1] complaint", "complaint"]
    assert done.returncode == 0


def test_the_first_failure_comes_last_and_alone(run, script, tmp_path):
    file = script(
        "def deep():\n"
        "    raise ValueError(f'from rank {rank}')\n"
        f"failing = r'{tmp_path}/failing'\n"
        "if rank == 1:\n"
        "    print('about to fail', file=sys.stderr)\n"
        "    open(failing, 'x').close()\n"
        "    deep()\n"
        "while not os.path.exists(failing):\n"
        "    time.sleep(0.001)\n"
        "time.sleep(0.3)\n"
        "raise RuntimeError('because of rank 1')\n"
    )
    done = run("--nproc", 3, file)
    before, _, report = done.stderr.partition("\nshardline run: ")
    assert before == "[rank 1] about to fail\n"
    assert report.startswith("rank 1 failed first, with exit code 1.\n\nTraceback (most recent call last):\n  File")
    assert report.endswith("ValueError: from rank 1\n")
    assert report.count("Traceback") == 1
    assert [Path(name).name for name in re.findall(r'File "([^"]+)"', report)] == ["script.py", "script.py"]
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("sys.exit(7)", 7, "rank 1 failed first, with exit code 7.\n\nThe script exited with code 7"),
        ("sys.exit('no data')", 1, "The script exited with code 1: no data"),
        ("os._exit(9)", 9, "rank 1 failed first, with exit code 9."),
        ("os.kill(os.getpid(), 9)", 137, "rank 1 was killed by SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", 139, "rank 1 was killed by SIGSEGV.\n\nFatal Python error"),
        ("if True print()", 1, "SyntaxError"),
    ],
    ids=["exit", "exit message", "_exit", "killed", "crash", "syntax"],
)
def test_exit_codes(run, script, body, code, words):
    if "print()" in body:
        file = script(body)
    else:
        file = script(f"if rank == 1:\n    {body}\ntime.sleep(600)")
    done = run("--nproc", 2, file)
    assert done.returncode == code
    assert words in done.stderr


def test_a_successful_exit_is_no_failure(run, script):
    done = run("--nproc", 2, script("sys.exit(0)"))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_all_ranks(script, tmp_path, name, code):
    file = script(
        f"open(r'{tmp_path}/pid{{}}'.format(rank), 'x').write(str(os.getpid()))\n"
        "try:\n"
        "    time.sleep(600)\n"
        "except KeyboardInterrupt:\n"
        "    print('cleaned up')\n"
        "    raise\n"
    )
    with started(file) as process:
        pids = wait_for_pids(tmp_path, 2)
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == code
    assert err == f"\nshardline run: ended by {name}.\n"
    assert out.count("cleaned up") == (2 if name == "SIGINT" else 0)
    assert_gone(pids)


def test_ranks_that_ignore_the_signal_are_killed(script, tmp_path):
    file = script(
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"open(r'{tmp_path}/pid{{}}'.format(rank), 'x').write(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    with started(file) as process:
        pids = wait_for_pids(tmp_path, 2)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=25)  # the agent alone would wait for 30 seconds
    assert process.returncode == 130
    assert_gone(pids)


def test_ranks_that_ignore_sigterm_are_killed_after_the_grace(script, tmp_path):
    file = script(
        "import signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open(r'{tmp_path}/pid{{}}'.format(rank), 'x').write(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    with started(file, "--nproc", "2", "--grace", "0.5") as process:
        pids = wait_for_pids(tmp_path, 2)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=25)
    assert process.returncode == 143
    assert_gone(pids)


def test_ranks_end_with_a_launcher_that_is_killed(script, tmp_path):
    file = script(f"open(r'{tmp_path}/pid{{}}'.format(rank), 'x').write(str(os.getpid()))\ntime.sleep(600)")
    with started(file) as process:
        pids = wait_for_pids(tmp_path, 2)
        process.kill()
    assert_gone(pids)


def started(file, *options):
    command = [sys.executable, "-m", "shardline.cli", "run", *(options or ("--nproc", "2")), str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_pids(folder, count):
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        files = [file.read_text() for file in folder.glob("pid*")]
        if len(files) == count and all(files):
            return [int(text) for text in files]
        time.sleep(0.02)
    raise AssertionError("the ranks did not start")


def assert_gone(pids):
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_log_dir_gets_a_file_for_each_rank_and_stream(run, script, tmp_path):
    logs = tmp_path / "new" / "logs"
    done = run("--nproc", 2, "--log-dir", logs, script("print('out', rank); print('err', rank, file=sys.stderr)"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {file.name: file.read_text() for file in logs.iterdir()} == {
        "rank0.out": "out 0\n",
        "rank1.out": "out 1\n",
        "rank0.err": "err 0\n",
        "rank1.err": "err 1\n",
    }


def test_restarts(run, script, tmp_path, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    file = script(
        "attempt = int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        "if attempt < 2:\n"
        "    raise OSError(f'attempt {attempt}')\n"
        "print('done')\n"
    )
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    done = run("--nproc", 1, "--max-restarts", 2, file)
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert done.stderr == (
        "shardline run: OSError: attempt 0; restart 1 of 2.\nshardline run: OSError: attempt 1; restart 2 of 2.\n"
    )
    assert list(temporary.iterdir()) == []  # no scratch file is left


def test_a_module(run, script, tmp_path, monkeypatch):
    script("print(__name__, sys.argv[1:], rank)", name="some_module.py")
    monkeypatch.chdir(tmp_path)
    done = run("--nproc", 1, "-m", "some_module", "x")
    assert (done.stdout, done.returncode) == ("__main__ ['x'] 0\n", 0), done.stderr


def test_a_script_finds_its_neighbours_and_its_functions_can_be_sent(run, script, tmp_path, monkeypatch):
    (tmp_path / "neighbour.py").write_text("value = 41\n")
    file = script(
        "import multiprocessing, neighbour\n"
        "def plus(n): return neighbour.value + n\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(plus, [1]))\n"
    )
    monkeypatch.chdir("/")
    done = run("--nproc", 1, file)
    assert (done.stdout, done.returncode) == ("[42]\n", 0), done.stderr


def test_two_nodes_on_one_machine(script):
    """Each launcher is a node; they meet at the address given."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = script("print(rank, os.environ['WORLD_SIZE'], os.environ['GROUP_RANK'], os.environ['LOCAL_RANK'])")
    place = ["--nproc", "1", "--nnodes", "2", "--master", f"127.0.0.1:{port}", "--node-rank"]
    with started(file, *place, "0") as first, started(file, *place, "1") as second:
        try:
            done = [node.communicate(timeout=LIMIT) for node in (first, second)]
        finally:
            first.kill()
            second.kill()
    assert done == [("0 2 0 0\n", ""), ("[rank 1] 1 2 1 0\n", "")]
    assert (first.returncode, second.returncode) == (0, 0)


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (Launch("absent.py"), "no script 'absent.py'"),
        (Launch(__file__, nproc=0), "--nproc is 0"),
        (Launch(__file__, grace=-1.0), "--grace is -1"),
        (Launch(__file__, grace=float("nan")), "--grace is nan"),
        (Launch(__file__, nnodes=2), "needs --master"),
        (Launch(__file__, nnodes=2, node_rank=2, master="a"), "node ranks go from 0 to nnodes - 1"),
        (Launch(__file__, master="a:b"), "HOST or HOST:PORT"),
        (Launch(__file__, log_dir=Path(__file__)), "is not a directory"),
    ],
)
def test_impossible_jobs_are_said(job, words):
    with pytest.raises(LaunchError, match=re.escape(words)):
        launch(job)


def failure(local_rank, code, error_file, timestamp=100):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    made = ProcessFailure(local_rank, 1, code, str(error_file))
    if not error_file.exists():
        made.timestamp = timestamp
    return made


def test_which_failure_was_first(tmp_path):
    record = '{{"message": {{"message": "m", "extraInfo": {{"py_callstack": "m", "timestamp": "100"}}}}, "time": {}}}'
    early, late = tmp_path / "early", tmp_path / "late"
    early.write_text(record.format(100.25))
    late.write_text(record.format(100.75))
    none = tmp_path / "none"
    raised_early, raised_late = failure(0, 1, early), failure(1, 1, late)
    killed = failure(2, -9, none)  # noticed in the same second: the others raised because of it
    ended = failure(3, -15, none, timestamp=90)  # by the agent
    killed_much_later = failure(4, -9, none, timestamp=130)
    assert min([raised_late, raised_early, ended, killed_much_later], key=_happened_at) is raised_early
    assert min([raised_late, raised_early, killed, ended], key=_happened_at) is killed
    assert min([ended], key=_happened_at) is ended


def test_rank_zero_keeps_the_terminal(tmp_path):
    envs = {local: {"RANK": str(local), "TORCHELASTIC_RESTART_COUNT": "0"} for local in range(2)}
    destinations = _Logs(tmp_path, None).reify(envs)
    assert destinations.stdouts[0] == destinations.stderrs[0] == ""
    assert set(destinations.tee_stdouts) == set(destinations.tee_stderrs) == {1}
