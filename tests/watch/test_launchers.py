"""Under `shardline run`: what is said last names the rank that is missing, and the exit code is not 0."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks see each other under /proc")

SCRIPT = "from tests.watch.situations import train\ntrain({what!r}, 3, {transport!r}, {folder!r})\n"
COMMAND = ["-m", "shardline", "run", "--nproc", "2", "--device", "cpu"]


def launch(tmp_path, what: str, transport: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    path = f"import sys; sys.path[:0] = {sys.path!r}\n"
    script.write_text(path + SCRIPT.format(what=what, transport=transport, folder=str(tmp_path / "saved")))
    command = [sys.executable, *COMMAND, str(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


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
