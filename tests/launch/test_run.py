from __future__ import annotations

import gc
import json
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
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from shardline.cli import main
from shardline.errors import LaunchError
from shardline.launch.run import Launch, _check, _first, _kill_stragglers, _Logs, _Record, _report, launch
from tests.sockets import free_port

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
    for name in (  # what the launcher may set
        "OMP_NUM_THREADS",
        "TORCHELASTIC_SIGNALS_TO_HANDLE",
        "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME",
        "SHARDLINE_DEVICE",
    ):
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
        "print(rank, total.item(), sys.argv[1:], os.environ['OMP_NUM_THREADS'], os.environ['SHARDLINE_DEVICE'])\n"
        "print('complaint', file=sys.stderr)\n"
    )
    done = run("--nproc", 2, "--device", "cpu", file, "--flag", "value", "-m")
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    line = f"2.0 ['--flag', 'value', '-m'] {threads} cpu"
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


def test_what_a_killed_launcher_left_is_removed_by_the_next(run, script, tmp_path, monkeypatch):
    """Not what another user has made, a running launcher holds, or only looks alike."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    file = script(f"open(r'{tmp_path}/pid{{}}'.format(rank), 'x').write(str(os.getpid()))\ntime.sleep(600)")
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with started(file, "--nproc", "1") as killed:
        pids = wait_for_pids(tmp_path, 1)
        killed.kill()
    assert_gone(pids)
    (left,) = temporary.iterdir()
    (tmp_path / "pid0").unlink()
    with started(file, "--nproc", "1") as running:
        wait_for_pids(tmp_path, 1)
        (held,) = set(temporary.iterdir()) - {left}
        others = [temporary / name for name in ("shardline-run-open", "shardline-run-new", "other")]
        for other in others:
            other.mkdir(mode=0o755 if other.name.endswith("open") else 0o700)
        (temporary / "shardline-run-link").symlink_to(tmp_path)
        for old in (left, held, others[0]):
            os.utime(old, (0, 0))
        assert run("--nproc", 1, script("pass", "short.py")).returncode == 0
        assert set(temporary.iterdir()) == {held, *others, temporary / "shardline-run-link"}
        running.terminate()
        running.communicate(timeout=LIMIT)
    assert not held.exists()


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


@pytest.mark.parametrize(
    "master",
    [
        pytest.param((), id="no address", marks=pytest.mark.slow),
        pytest.param(("--master", "127.0.0.1:{port}"), id="one"),
    ],
)
def test_ranks_find_each_other_after_a_restart(run, script, master):
    """What the last attempt left in its store, such as the addresses of its ranks, must not be found by the next."""
    port = free_port()
    file = script(
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "total = torch.ones(1)\n"
        "dist.all_reduce(total)\n"
        "if rank == 1 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    raise OSError('once')\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
        "print('met', os.environ['MASTER_ADDR'], os.environ['MASTER_PORT'])\n"
    )
    done = run("--nproc", 2, "--max-restarts", 1, *(part.format(port=port) for part in master), file)
    assert done.stderr == "shardline run: OSError: once; restart 1 of 1.\n"
    assert done.returncode == 0
    first, second = done.stdout.replace("[rank 1] ", "").splitlines()
    assert first == second
    assert first.startswith("met 127.0.0.1 ")
    assert first.endswith(f" {port}") or not master


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
    port = free_port()
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
        (Launch(__file__, device="xpu"), "The device 'xpu' was asked for, and torch sees no accelerator"),
        (Launch(__file__, device="gpu"), 'it must be "cpu" or a type of accelerator'),
        (Launch(__file__, grace=-1.0), "--grace is -1"),
        (Launch(__file__, grace=float("nan")), "--grace is nan"),
        (Launch(__file__, nnodes=2), "Several nodes need --master"),
        (Launch(__file__, nnodes=2, node_rank=2, master="a"), "node ranks go from 0 to nnodes - 1"),
        (Launch(__file__, nnodes=0), "--nnodes is 0; it must be at least 1"),
        (Launch(__file__, nnodes=2, max_nnodes=1, master="a"), "--nnodes is 2:1"),
        (Launch(__file__, nnodes=1, max_nnodes=2, master="a", node_rank=1), "nodes get theirs"),
        (Launch(__file__, nnodes=1, max_nnodes=2, master="a"), "need a secret: --secret-file FILE"),
        (Launch(__file__, master="a:b"), "HOST or HOST:PORT"),
        (Launch(__file__, master="127.0.0.1:99999"), "a port of 1 to 65535"),
        (Launch(__file__, master="127.0.0.1:0"), "a port of 1 to 65535"),
        (Launch(__file__, max_restarts=-1), "--max-restarts is -1"),
        (Launch(__file__, join_timeout=float("nan")), "--join-timeout is nan"),
        (Launch(__file__, log_dir=Path("/proc/x")), "Cannot write to --log-dir /proc/x"),
        (Launch(__file__, log_dir=Path(__file__)), "Cannot write to --log-dir"),
    ],
)
def test_impossible_jobs_are_said(job, words):
    with pytest.raises(LaunchError, match=re.escape(words)):
        launch(job)


def test_a_port_that_is_taken(run, script):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("--nproc", 1, "--master", f"127.0.0.1:{port}", script("print('ran')"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"shardline: Cannot listen on 127.0.0.1, port {port}: Address already in use. "
        f"Another program has this port; choose another one. [SL901]\n"
    )


def test_the_secret_of_a_job(tmp_path, monkeypatch):
    def job(file=None):
        return Launch(__file__, nnodes=1, max_nnodes=2, master="127.0.0.1", secret_file=file)

    secret = "0123456789abcdef"
    monkeypatch.setenv("SHARDLINE_SECRET", f"{secret}\n")
    meeting = _check(job())
    assert meeting.secret == secret.encode()
    assert secret not in repr(meeting)  # torch logs it
    assert "SHARDLINE_SECRET" not in os.environ  # ranks do not get it
    monkeypatch.setenv("SHARDLINE_SECRET", secret[1:])
    with pytest.raises(LaunchError, match="shorter than 16 characters"):
        _check(job())
    monkeypatch.delenv("SHARDLINE_SECRET", raising=False)

    file = tmp_path / "secret"
    file.write_text(secret)
    for mode in (0o640, 0o604, 0o620):
        file.chmod(mode)
        with pytest.raises(LaunchError, match="is open to other users"):
            _check(job(file))
    file.chmod(0o600)
    for each in (job(file), Launch(__file__)):  # nor where it is not needed
        monkeypatch.setenv("SHARDLINE_SECRET", "another one of enough letters")
        assert _check(each).secret == (secret.encode() if each.secret_file else b"")
        assert "SHARDLINE_SECRET" not in os.environ
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(LaunchError, match="is not a file"):
        _check(job(tmp_path / "fifo"))
    with pytest.raises(LaunchError, match="No such file"):
        _check(job(tmp_path / "absent"))


def failure(local_rank, code, pid=0):
    return ProcessFailure(local_rank, pid, code, "")


def record(time, lost_peer=False, gone=()):
    return _Record(lost_peer, time, 1, "", frozenset(gone))


@pytest.mark.parametrize(
    ("failures", "records", "first"),
    [
        ([(1, 1), (0, 1)], {0: record(1.0), 1: record(2.0)}, 0),
        ([(1, 1), (0, -15)], {0: record(1.0), 1: record(2.0)}, 0),  # ended by the agent while it left
        ([(1, 1), (0, 1)], {0: record(2.0), 1: record(1.0, lost_peer=True)}, 0),  # slow to leave
        ([(1, 1), (0, 1)], {0: record(1.0, lost_peer=True), 1: record(2.0, lost_peer=True)}, 0),
        ([(0, 1), (1, -9)], {0: record(1.0, gone=[101])}, 1),
        ([(0, 1), (1, -15)], {0: record(1.0, gone=[101])}, 1),  # by another process
        ([(0, 1), (1, -9)], {0: record(1.0)}, 0),
        ([(0, 1), (1, -15), (2, -9)], {0: record(1.0, gone=[101, 102])}, 2),
        ([(1, -6), (0, 1)], {0: record(1.0, gone=[101])}, 0),  # aborted when rank 0 closed it
        ([(1, -6), (0, 1)], {0: record(1.0, lost_peer=True, gone=[101])}, 1),
        ([(1, -15), (0, 3)], {}, 0),
        ([(1, -15)], {}, 1),
    ],
)
def test_which_failure_was_first(failures, records, first):
    assert _first({rank: failure(rank, code, 100 + rank) for rank, code in failures}, records) == first


LINK = """
import atexit, signal, socket
path = sys.argv[1]
def linked():
    # rank 1 sees when rank 0 is gone, and the reverse
    if rank == 0:
        server = socket.socket(socket.AF_UNIX)
        server.bind(path + '.new')
        server.listen()
        os.rename(path + '.new', path)
        return server.accept()[0]
    client = socket.socket(socket.AF_UNIX)
    while not os.path.exists(path):
        time.sleep(0.005)
    client.connect(path)
    return client
link = linked()
def wait():
    if link.recv(1) == b'':
        raise RuntimeError('Connection closed by peer')
def die(number):
    os.kill(os.getpid(), number)
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("guilty", "other", "code", "words"),
    [
        ("raise ValueError('mine')", "wait()", 1, "failed first, with exit code 1"),
        (
            "atexit.register(time.sleep, 600); atexit.register(link.close); raise ValueError('mine')",
            "wait()",
            1,
            "failed first, with exit code 1",
        ),
        (
            "try: raise ValueError('mine')\n    finally: link.close(); time.sleep(1)",
            "try: wait()\n    finally: time.sleep(600)",
            1,
            "failed first, with exit code 1",
        ),
        (
            "try: raise ValueError('mine')\n    finally: link.close(); time.sleep(0.5)",
            "wait()",
            1,
            "failed first, with exit code 1",
        ),
        (
            "atexit.register(time.sleep, 1); atexit.register(link.close); raise ValueError('mine')",
            "link.recv(1); die(9)",
            1,
            "failed first, with exit code 1",
        ),
        (
            "raise ValueError('mine')",
            "signal.signal(15, lambda *_: sys.exit(5)); time.sleep(600)",
            1,
            "failed first, with exit code 1",
        ),
        ("sys.exit(7)", "wait()", 7, "failed first, with exit code 7"),
        ("os._exit(7)", "wait()", 7, "failed first, with exit code 7"),
        (
            "os._exit(7)",
            "link.recv(1); raise KeyError('not a word of connections')",
            7,
            "failed first, with exit code 7",
        ),
        ("die(9)", "wait()", 137, "was killed by SIGKILL"),
        ("die(11)", "wait()", 139, "was killed by SIGSEGV"),
        ("die(15)", "wait()", 143, "was killed by SIGTERM"),
        ("die(9)", "signal.signal(15, lambda *_: sys.exit(5)); time.sleep(600)", 137, "was killed by SIGKILL"),
    ],
)
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_the_head_line_is_of_the_rank_that_failed_by_itself(run, script, tmp_path, rank, guilty, other, code, words):
    file = script(f"{LINK}if rank == {rank}:\n    {guilty}\nelse:\n    {other}\n")
    done = run("--nproc", 2, file, tmp_path / "link")
    assert (done.returncode, f"\nshardline run: rank {rank} {words}" in done.stderr) == (code, True), done.stderr
    if "mine" in guilty:
        assert done.stderr.endswith("ValueError: mine\n")


def test_what_another_rank_saw_of_the_first_failure(tmp_path, capsys):
    """The phase of a rank that was killed: nobody else can say it."""
    logs = _Logs(tmp_path, None)
    logs.reify({local: {"RANK": str(local)} for local in range(2)})
    (tmp_path / "attempt0" / "101.exit").write_text("rank 1 (process 101) ended. It was in the forward of step 4.")
    assert _report({1: failure(1, -9, 101)}, logs) == 137
    assert capsys.readouterr().err == (
        "\nshardline run: rank 1 was killed by SIGKILL (often the system's answer to a lack of memory).\n\n"
        "rank 1 (process 101) ended. It was in the forward of step 4.\n"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the agent kills them later")
def test_a_rank_that_does_not_end_by_sigterm_is_killed_soon_after_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr("shardline.launch.run._FAILED_SECONDS", 0.2)
    logs = _Logs(tmp_path, None)
    logs.reify({local: {"RANK": str(local)} for local in range(2)})
    with subprocess.Popen([sys.executable, "-c", ""]) as over:
        pass
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as stopped:
        stopped.send_signal(signal.SIGSTOP)
        for local, process in enumerate((over, stopped)):
            Path(f"{logs.error_files[local]}.pid").write_text(str(process.pid))
        with _kill_stragglers(logs):
            said = {"message": {"message": "ValueError"}, "time": 1.0, "code": 1, "lost_peer": False, "gone": []}
            logs.error_files[0].write_text(json.dumps(said))
            assert stopped.wait(60) == -signal.SIGKILL


def test_rank_zero_keeps_the_terminal(tmp_path):
    envs = {local: {"RANK": str(local), "TORCHELASTIC_RESTART_COUNT": "0"} for local in range(2)}
    destinations = _Logs(tmp_path, None).reify(envs)
    assert destinations.stdouts[0] == destinations.stderrs[0] == ""
    assert set(destinations.tee_stdouts) == set(destinations.tee_stderrs) == {1}
