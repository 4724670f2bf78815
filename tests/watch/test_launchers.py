"""Under `shardline run` and torchrun: the rank that fails is named, all ranks end, and the exit code is not 0."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.watch.documented import documented

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks see each other under /proc")

SCRIPT = "from tests.watch.situations import train\ntrain({what!r}, 3, {transport!r}, {folder!r})\n"
COMMAND = ["-m", "shardline", "run", "--nproc", "2", "--device", "cpu"]


def launch(tmp_path, what: str, transport: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    path = f"import sys; sys.path[:0] = {sys.path!r}\n"
    script.write_text(path + SCRIPT.format(what=what, transport=transport, folder=str(tmp_path / "saved")))
    command = [sys.executable, *COMMAND, str(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("transport", ["auto", pytest.param("gloo", marks=pytest.mark.slow)])
def test_a_rank_that_ends_early_is_named(tmp_path, transport):
    done = launch(tmp_path, "sys.exit(0)", transport)
    assert done.returncode != 0
    sentence = (
        r"rank 1 \(process \d+\) ended while rank 0 waits in the gather of unit 'blocks\.0' in the forward of step 4"
    )
    assert re.search(sentence, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    report = done.stderr.partition("\nshardline run: ")[2]
    assert report.startswith("rank 0 lost another rank and ended, with exit code 1.\n\nLostRankError: rank 1 "), report


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["auto", "gloo"])
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("exception", "ValueError: the batch is bad"),
        ("save", r"save_checkpoint\(\) must be called on all ranks"),
        ("endless loop", r"in sleep_for_ever"),
    ],
)
def test_other_faults(tmp_path, transport, what, words):
    done = launch(tmp_path, what, transport)
    assert done.returncode != 0 and re.search(words, done.stderr), done.stderr


# ------------------------------------------------------------------------------------------------------------- torchrun


def torchrun(tmp_path, what: str, transport: str = "auto") -> tuple[int, str]:
    """The exit code, and what the ranks and torchrun wrote to stderr."""
    pids = tmp_path / "pids"
    pids.mkdir()
    script = tmp_path / "script.py"
    path = f"import os, sys; sys.path[:0] = {sys.path!r}\nopen(f'{pids}/{{os.getpid()}}', 'x')\n"
    script.write_text(path + SCRIPT.format(what=what, transport=transport, folder=str(tmp_path / "saved")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    with open(tmp_path / "stderr", "w+") as stderr:
        done = subprocess.run(command, stdout=stderr, stderr=stderr, timeout=200)
        assert [pid for pid in pids.iterdir() if Path(f"/proc/{pid.name}").exists()] == []
        stderr.seek(0)
        return done.returncode, stderr.read()


STACK = "Traceback (most recent call last)"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        # torchrun, which ends the others at once, often comes first
        (
            "killed",
            r"^shardline: rank 1 \(process \d+\) ended while rank 0|rank +: 1 .*\n +exitcode +: -9 \(pid: \d+\)",
        ),
        pytest.param("exception", r"ValueError: the batch is bad", marks=pytest.mark.slow),
        pytest.param("sys.exit(0)", r"^shardline: rank 1 \(process \d+\) ended while rank 0", marks=pytest.mark.slow),
        pytest.param("stopped", r"Rank 1 is stopped, as by SIGSTOP or a debugger: `kill -CONT", marks=pytest.mark.slow),
        pytest.param("fewer batches", r"did one have fewer batches\?", marks=pytest.mark.slow),
        pytest.param("save", r"save_checkpoint\(\) must be called on all ranks", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("transport", ["auto", pytest.param("gloo", marks=pytest.mark.slow)])
def test_faults_under_torchrun(tmp_path, what, words, transport):
    code, said = torchrun(tmp_path, what, transport)
    assert code != 0 and re.search(words, said, re.MULTILINE), said
    ours, _, _ = said.partition("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")
    stacks = [line for line in ours.splitlines() if STACK in line and line.startswith("[rank")]
    assert len(stacks) <= 1, said


@pytest.mark.parametrize("busy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ranks_end_with_a_torchrun_that_is_killed(tmp_path, busy):
    """Also where the main thread waits for another rank."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "import os, time, shardline, torch.distributed as dist\n"
        "shardline.init_distributed()\n"
        "rank = os.environ['RANK']\n"
        f"open(r'{tmp_path}/new' + rank, 'w').write(str(os.getpid()))\n"
        f"os.rename(r'{tmp_path}/new' + rank, r'{tmp_path}/pid' + rank)\n"
        f"if {busy} and rank == '0': dist.barrier()\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    with open(tmp_path / "stderr", "w+") as stderr, subprocess.Popen(command, stdout=stderr, stderr=stderr) as launcher:
        pids = [int(wait_for(tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
        launcher.kill()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
        stderr.seek(0)
        said = stderr.read()
    for rank in range(2):
        assert f"shardline: the launcher (process {launcher.pid}) has ended, so rank {rank} ends too." in said
    assert re.search(documented("the launcher (process"), said)


def wait_until(done) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for(file: Path) -> Path:
    wait_until(file.exists)
    return file
