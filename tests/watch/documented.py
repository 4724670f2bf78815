"""What docs/failures.md promises that users see: the tests look for these very words in what processes wrote."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs" / "failures.md"

CLAIMED = {
    "It ended by itself": "test_failures.test_a_rank_that_ends",
    "It left no word": "test_failures.test_a_rank_that_ends",
    "It said: ValueError": "test_failures.test_a_rank_that_ends",
    "is stopped, as by SIGSTOP": "test_failures.test_a_process_that_is_stopped",
    "in full_state_dict().": "test_failures.test_ranks_out_of_step",
    "in save_checkpoint() after": "test_failures.test_ranks_out_of_step",
    "did one have fewer batches?": "test_failures.test_ranks_out_of_step",
    "the comparison of the ranks": "test_failures.test_ranks_out_of_step",
    "had no backward": "test_failures.test_a_backward_that_one_rank_leaves_out",
    "nothing has moved": "test_failures.test_a_rank_that_hangs",
    "has come after": "test_failures.test_a_rank_that_is_slow_is_named_and_the_incident_withdrawn",
    "the launcher (process": "test_launchers.test_ranks_end_with_a_torchrun_that_is_killed",
    "Nothing has come from": "test_hosts.test_a_rank_of_another_host_that_ends",
    "nodes are at": "tests/launch/test_rendezvous.test_nodes_that_do_not_fit_say_so",
    "no launcher of node 0": "tests/launch/test_rendezvous.test_nodes_that_do_not_fit_say_so",
    "ranks are here": "tests/runtime/test_process_group.test_ranks_that_do_not_come_are_named",
    "in shardline.initialize()": "tests/runtime/test_process_group.test_a_rank_that_does_not_come_to_initialize",
}
"""A part of each message, and the test that produces the message."""


@cache
def messages() -> tuple[str, ...]:
    """The messages in the page: what is in italics, and lines that begin with the name of the program."""
    text = DOCS.read_text()
    italics = re.findall(r"(?<!\*)\*(?![*\s])([^*]+?)\*(?!\*)", text.partition("## Before a job")[0])
    return (*(" ".join(each.split()) for each in italics), *re.findall(r"^    (shardline.*)$", text, re.MULTILINE)[:5])


def documented(part: str) -> str:
    """A regular expression of the one message that has ``part``: numbers, and the names of hosts, may be others."""
    (message,) = [each for each in messages() if part in each]
    assert part in CLAIMED, "say there which test produces it"
    pattern = re.escape(message).replace(re.escape("..."), ".*")
    pattern = pattern.replace("node7", r"\S+").replace(r"ranks\ 4\ to\ 7", r"ranks? [\d, andto]+")
    return re.sub(r"(?<!\\)\d+", r"\\d+", pattern)
