"""Ranks of several hosts: what one host knows of another comes through the rendezvous store."""

from __future__ import annotations

import re
import sys

import pytest

from tests.watch.documented import documented
from tests.watch.processes import Processes
from tests.watch.situations import train_apart

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks see each other under /proc")

HUNG = ("endless loop", "stopped")
WAITS = r"while rank 0 waits in the gather of unit 'blocks\.0' in the forward of step 4\. "
SILENT = r"Nothing has come from b \(rank 1\) for \d+ s: its processes are gone or stopped, it is down, or the netw"


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    made = Processes(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


def run(processes, folder, what, hosts, timeout=6.0):
    """The last rank of ``hosts`` does ``what``."""
    spare = [len(hosts) - 1] if what in HUNG else []
    ended = processes.run(train_apart, len(hosts), hosts, what, 3, "gloo", str(folder), timeout, spare=spare)
    assert ended.late == [], f"rank {ended.late} hangs:\n" + "\n".join(ended.said)
    return ended


def on(cases, quick):
    """The first ``quick`` cases are in the default suite."""
    return [
        pytest.param(*case, id=f"{case[1]} on {case[0]}", marks=pytest.mark.slow if index >= quick else ())
        for index, case in enumerate(cases)
    ]


ENDS = [
    (
        "a b b",
        "killed",
        r"^shardline: rank 2 \(process \d+\) ended " + WAITS + r"It was .* It left no word, as after",
    ),
    ("a b", "killed", r"^shardline: rank 0 lost the others .*: .*Connection (reset|closed) by peer.*\. " + SILENT),
    ("a b b", "sys.exit(0)", r"^shardline: rank 2 \(process \d+\) ended " + WAITS + r"It was .* It ended by itself"),
    (
        "a b",
        "exception",
        r"^shardline: rank 1 \(process \d+\) ended " + WAITS + r".* It said: ValueError: the batch is b",
    ),
]


@pytest.mark.parametrize(("hosts", "what", "words"), on(ENDS, 2))
def test_a_rank_of_another_host_that_ends(processes, tmp_path, hosts, what, words):
    ended = run(processes, tmp_path, what, hosts.split())
    assert ended.codes[0] == 1
    assert re.search(words, ended.said[0].splitlines()[-1]), ended.said[0]
    assert SILENT not in words or re.search(documented("Nothing has come from"), ended.said[0])
    assert "Traceback" not in ended.said[0]


OUT_OF_STEP = [
    (
        "a b",
        "save",
        r"after step 3 rank 0 starts the gather of unit 'blocks\.0' in its training, rank 1 starts a message to "
        r"all ranks in save_checkpoint\(\)\. save_checkpoint\(\) must be called on all ranks\.",
    ),
    (
        "a b",
        "state dict",
        r"after step 3 rank 0 starts the gather of unit '.*' in its training, rank 1 starts the gather of unit '.*' in "
        r"full_state_dict\(\)\. full_state_dict\(\) must be called on all ranks\.",
    ),
    (
        "a b b",
        "no step",
        r"each of ranks 0 and 1 waits in the comparison of the ranks at the end of the step in the update of step 4, "
        r"rank 2 waits in the gather",
    ),
    ("a b b", "fewer batches", r"did one have fewer batches\?"),
]


@pytest.mark.parametrize(("hosts", "what", "words"), on(OUT_OF_STEP, 2))
def test_hosts_out_of_step(processes, tmp_path, hosts, what, words):
    ended = run(processes, tmp_path, what, hosts.split())
    assert ended.codes == [1] * len(ended.codes)
    for said in ended.said:
        assert re.search(r"ranks are out of step.*" + words, said), said
        assert "initialized" in said and "ended" not in said.splitlines()
        assert len(re.findall("gave up", said)) <= 1


def test_a_rank_of_another_host_that_hangs(processes, tmp_path):
    ended = run(processes, tmp_path, "endless loop", ["a", "b"])
    assert re.search(
        r"^shardline: for \d+ s nothing has moved: rank 0 waits in the gather of unit 'blocks\.0' in the forward of "
        r"step 4, for rank 1 \(process \d+ on b\)\. Rank 1 has been in the script's own code after step 3 for "
        r"\d+ s\.\nRank 1: Stack \(most recent call first\):\n"
        r"  File \".*situations\.py\", line \d+ in sleep_for_ever\n",
        ended.said[0],
        re.MULTILINE,
    ), ended.said[0]
    last = ended.said[0].splitlines()[-1]
    assert last.startswith("shardline: rank 0 waited 6 s for rank 1, which runs but does not come, in the gather"), last


@pytest.mark.slow
def test_a_stopped_process_is_seen_by_a_rank_of_its_host(processes, tmp_path):
    ended = run(processes, tmp_path, "stopped", ["a", "b", "b"])
    assert re.search(r"Rank 2 is stopped, as by SIGSTOP or a debugger: `kill -CONT \d+`", ended.said[0]), ended.said[0]


def test_a_slow_rank_of_another_host_is_withdrawn(processes, tmp_path):
    ended = run(processes, tmp_path, "slow", ["a", "b"])
    assert ended.codes == [0, 0]
    lines = [line for line in ended.said[0].splitlines() if line.startswith("shardline: ")]
    assert len(lines) == 2 and "rank 0 waits in the gather" in lines[0], lines
    assert re.fullmatch(r"shardline: rank 1 has come after \d+ s, and the job goes on\.", lines[1])
    assert "nothing has moved" not in ended.said[1]


@pytest.mark.slow
def test_a_host_of_which_nothing_comes_though_its_connections_are_open(processes, tmp_path):
    """As where the network between hosts is gone."""
    ended = run(processes, tmp_path, "stopped", ["a", "b"], timeout=8.0)
    last = ended.said[0].splitlines()[-1]
    assert last.startswith("shardline: rank 0 waited 8 s for rank 1, in the gather"), last
    assert re.search(SILENT, last) and "runs but does not come" not in last
