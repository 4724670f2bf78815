"""One rank dies, hangs, or does something else than the others: the others say so and end. Real processes."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.watch.documented import CLAIMED, documented, messages
from tests.watch.processes import Ended, Processes
from tests.watch.situations import train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks see each other under /proc")

HUNG = ("endless loop", "stopped")

DOCUMENTED = {
    "sys.exit(0)": "It ended by itself",
    "os._exit(0)": "It left no word",
    "killed": "It left no word",
    "abort": "It left no word",
    "exception": "It said: ValueError",
    "state dict": "in full_state_dict().",
    "save": "in save_checkpoint() after",
    "fewer batches": "did one have fewer batches?",
    "no step": "the comparison of the ranks",
}
"""A part of what docs/failures.md says of each; the page shows what is seen over shared memory."""


def test_each_message_of_the_page_is_produced_by_a_test():
    for message in messages():
        assert [part for part in CLAIMED if part in message], f"no test produces what docs/failures.md shows: {message}"
    for part in CLAIMED:
        documented(part)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    made = Processes(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


def run(processes: Processes, folder: Path, what: str, stage: int, transport: str, world: int = 2) -> Ended:
    spare = [world - 1] if what in HUNG else []
    ended = processes.run(train, world, what, stage, transport, str(folder), spare=spare)
    assert ended.late == [], f"rank {ended.late} hangs:\n" + "\n".join(ended.said)
    left = [name for name in shared_memory() if any(str(pid) in name for pid in ended.pids)]
    assert left == [], "files of shared memory"
    return ended


def both(cases):
    """Each case on both transports; one of the two is slow, so that the default suite is short."""
    return [
        pytest.param(
            what, transport, words, id=f"{what}-{transport}", marks=pytest.mark.slow if (index + turn) % 2 else ()
        )
        for index, (what, words) in enumerate(cases)
        for turn, transport in enumerate(("auto", "gloo"))
    ]


WAITS = r"while rank 0 waits in the gather of unit 'blocks\.0' in the forward of step 4\. "
DEAD = [
    (
        "sys.exit(0)",
        r"ended " + WAITS + r"It was in the script's own code after step 3\. It ended by itself: its script",
    ),
    (
        "os._exit(0)",
        r"ended " + WAITS + r"It was in the script's own code after step 3\. It left no word, as after os\._",
    ),
    ("killed", r"ended " + WAITS + r"It was .* It left no word, as after os\._exit\(\), SIGKILL"),
    ("abort", r"ended " + WAITS + r"It was .* or a crash in C code\."),
    ("exception", r"ended " + WAITS + r"It was .* It said: ValueError: the batch is bad"),
]


@pytest.mark.parametrize(("what", "transport", "words"), both(DEAD))
def test_a_rank_that_ends(processes, tmp_path, what, transport, words):
    ended = run(processes, tmp_path, what, 3, transport)
    assert ended.codes[0] == 1
    last = ended.said[0].splitlines()[-1]
    assert re.search(r"^shardline: rank 1 \(process \d+\) " + words, last) and last.endswith("[SL701]")
    assert re.search(documented(DOCUMENTED[what]), last), last
    assert "Traceback" not in ended.said[0], "the stack that helps is that of the rank that failed"


OUT_OF_STEP = [
    ("fewer batches", r"rank 1 starts the gather of unit 'blocks\.0' in destroy\(\)\..* did one have fewer batches\?"),
    ("save", r"rank 1 (starts|waits in) a message to all ranks in save_checkpoint\(\).* save_checkpoint\(\) must be c"),
    ("load", r"rank 1 (starts|waits in) a message to all ranks in load_checkpoint\(\).* load_checkpoint\(\) must be c"),
    (
        "state dict",
        r"rank 1 starts the gather of unit 'blocks\.0' in full_state_dict\(\)\. full_state_dict\(\) must be",
    ),
    (
        "gathered",
        r"gather of unit 'blocks\.0' in gathered_parameters\(\)\. gathered_parameters\(\) must be called on al",
    ),
    ("evaluation", r"[Ee]very rank must"),
    ("skipped batch", r"did one have fewer batches\?"),
    ("frozen", r"rank 1 (starts|waits in) a message to all ranks in (its training|the forward of step 4)"),
    (
        "no step",
        r"rank 0 waits in the comparison of the ranks at the end of the step in the update of step 4, rank 1 wa",
    ),
    ("one more step", r"rank 0 starts the gather of unit '.*' in destroy\(\), rank 1 starts .* in its training\."),
]


@pytest.mark.parametrize(("what", "transport", "words"), both(OUT_OF_STEP))
def test_ranks_out_of_step(processes, tmp_path, what, transport, words):
    ended = run(processes, tmp_path, what, 3, transport)
    assert ended.codes == [1, 1]
    for said in ended.said:
        assert re.search(r"DisagreementError: .*" + words, said), said
        assert transport != "auto" or what not in DOCUMENTED or re.search(documented(DOCUMENTED[what]), said), said
        assert "initialized" in said and "ended" not in said.splitlines()


def test_of_ranks_that_disagree_one_prints_a_stack(processes, tmp_path):
    ended = run(processes, tmp_path, "other configuration", 3, "gloo", world=3)
    assert ended.codes == [1, 1, 1]
    assert [said.count("Traceback") for said in ended.said] == [1, 0, 0], ended.said
    for said in ended.said:
        assert "DisagreementError: ranks disagree on the configuration's gradient_clipping: rank 0 has" in said


@pytest.mark.parametrize("transport", ["auto", pytest.param("gloo", marks=pytest.mark.slow)])
def test_a_rank_that_hangs(processes, tmp_path, transport):
    said = run(processes, tmp_path, "endless loop", 3, transport).said[0]
    paragraph = re.search(
        r"^shardline: for \d+ s nothing has moved: rank 0 waits in the gather of unit 'blocks\.0' in the forward of "
        r"step 4, for rank 1 \(process \d+ on \S+\)\. Rank 1 has been in the script's own code after step 3 for "
        r"\d+ s\.\nRank 1: Stack \(most recent call first\):\n"
        r"  File \".*situations\.py\", line \d+ in sleep_for_ever\n",
        said,
        re.MULTILINE,
    )
    assert paragraph and said.count("nothing has moved") == 1, said
    assert re.search(documented("nothing has moved"), paragraph[0])
    assert paragraph[0].splitlines()[0].removeprefix("shardline: ") in (tmp_path / "incidents.txt").read_text()
    assert re.search(
        r"^shardline: rank 0 waited 6 s for rank 1, which runs but does not come, in the gather of unit 'blocks\.0' in "
        r"the forward of step 4\. Rank 1 has been in the script's own code after step 3 for \d+ s\.",
        said.splitlines()[-1],
    ), said


@pytest.mark.parametrize("transport", ["gloo", pytest.param("auto", marks=pytest.mark.slow)])
def test_a_process_that_is_stopped(processes, tmp_path, transport):
    said = run(processes, tmp_path, "stopped", 3, transport).said[0]
    assert re.search(
        r"Rank 1 is stopped, as by SIGSTOP or a debugger: `kill -CONT \d+` on its host lets it go on\.", said
    )
    assert "Stack" not in said and re.search(documented("is stopped, as by SIGSTOP"), said)


@pytest.mark.parametrize("transport", ["auto", pytest.param("gloo", marks=pytest.mark.slow)])
def test_a_rank_that_is_slow_is_named_and_the_incident_withdrawn(processes, tmp_path, transport):
    ended = run(processes, tmp_path, "slow", 3, transport)
    assert ended.codes == [0, 0]
    lines = [line for line in ended.said[0].splitlines() if line.startswith("shardline: ")]
    assert len(lines) == 2 and "nothing has moved" in lines[0]
    assert re.fullmatch(r"shardline: rank 1 has come after \d+ s, and the job goes on\.", lines[1])
    assert re.search(documented("has come after"), lines[1])
    assert "nothing has moved" not in ended.said[1]


def test_a_backward_that_one_rank_leaves_out(processes, tmp_path):
    ended = run(processes, tmp_path, "no backward", 3, "auto")
    assert ended.codes == [0, 0]
    assert re.search(documented("had no backward"), ended.said[0]), ended.said[0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("transport", ["auto", "gloo"])
@pytest.mark.parametrize("what", ["sys.exit(0)", "killed", "save", "load", "state dict", "no step", "one more step"])
def test_other_stages_and_three_ranks(processes, tmp_path, what, transport, stage):
    """Whatever is said, it names the last rank, and nobody hangs."""
    ended = run(processes, tmp_path, what, stage, transport, world=3)
    if what == "one more step" or (what == "state dict" and stage == 0):  # the others are done, or not needed for it
        assert ended.codes[:2] == [0, 0], ended.said
        assert what == "state dict" or "Every rank must take the same steps" in ended.said[2]
        return
    assert ended.codes[:2] == [1, 1], ended.said
    assert all("rank 2" in said.splitlines()[-1] for said in ended.said[:2])
