"""From what ranks wrote down to a sentence: no process is needed for that."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardline.watch.incident import Seen, find, those
from shardline.watch.status import CHANNELS, SIZE, Cell, State, Status, label_at
from shardline.watch.words import CALL_CODES, Operation, Phase, label_of

NAMES = ["embedding", "blocks.0", "head"]


def seen(rank, *, phase=Phase.OUTSIDE, step=3, started=(5, 5, 5), process="runs", call="", waits=None, state=None):
    """``waits``: (channel, number, operation, unit)."""
    cells = [0] * (Cell.COUNT + CHANNELS)
    cells[Cell.PHASE], cells[Cell.STEP], cells[Cell.CALL] = phase, step, CALL_CODES[call]
    cells[Cell.COUNT :] = started
    if state is not None:
        cells[Cell.STATE] = state
    if waits is not None:
        channel, number, operation, unit = waits
        cells[Cell.STATE], cells[Cell.CHANNEL], cells[Cell.NUMBER] = State.WAITING, channel, number
        cells[Cell.LABEL] = label_of(operation, unit, CALL_CODES[call])
    return Seen(rank, "node7", 100 + rank, process, tuple(cells), 12.3)


GATHER = (0, 6, Operation.GATHER, 1)
AHEAD = (6, 5, 5)


def test_nobody_waits() -> None:
    assert find([seen(0), seen(1)], NAMES) is None


def test_who_waits_for_whom() -> None:
    waiting = [seen(rank, phase=Phase.FORWARD, waits=GATHER, started=AHEAD) for rank in (0, 2, 3)]
    found = find([waiting[0], seen(1), *waiting[1:]], NAMES)
    assert found is not None and found.absent == (1,) and not found.certain
    assert found.text == (
        "each of ranks 0, 2 and 3 waits in the gather of unit 'blocks.0' in the forward of step 4, for rank 1 (process "
        "101 on node7). Rank 1 has been in the script's own code after step 3 for 12 s."
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"process": "stopped"}, "Rank 1 is stopped, as by SIGSTOP or a debugger: `kill -CONT 101` on its host"),
        ({"process": "ended"}, "Rank 1 has ended; it was last in the script's own code after step 3."),
        ({"call": "save_checkpoint"}, "Rank 1 has been in save_checkpoint() after step 3 for 12 s. save_checkpoint()"),
        ({"phase": Phase.BACKWARD}, "Rank 1 has been in the backward of step 4 for 12 s."),
    ],
    ids=["stopped", "ended", "slow save", "slow backward"],
)
def test_what_keeps_a_rank(more, words) -> None:
    found = find([seen(0, phase=Phase.FORWARD, waits=GATHER, started=AHEAD), seen(1, **more)], NAMES)
    assert found is not None and found.absent == (1,) and words in found.why


def test_each_waits_for_what_the_other_does_not_do() -> None:
    saving = seen(0, call="save_checkpoint", waits=(2, 6, Operation.MESSAGE, None), started=(5, 5, 6))
    training = seen(1, phase=Phase.FORWARD, waits=GATHER, started=AHEAD)
    found = find([saving, training], NAMES)
    assert found is not None and found.certain
    assert found.text == (
        "ranks are out of step, and each waits for what another does not do: rank 0 waits in a message to all ranks in "
        "save_checkpoint() after step 3, rank 1 waits in the gather of unit 'blocks.0' in the forward of step 4. "
        "save_checkpoint() must be called on all ranks."
    )


def test_a_rank_that_waits_for_one_that_computes_is_not_out_of_step() -> None:
    """Rank 0 waits for rank 1, and that for rank 2, which is slow: all will come."""
    ranks = [
        seen(0, waits=(0, 7, Operation.GATHER, 2), started=(7, 5, 5)),
        seen(1, waits=GATHER, started=AHEAD),
        seen(2),
    ]
    found = find(ranks, NAMES)
    assert found is not None and found.absent == (2,) and not found.certain


def test_ranks_that_exchanged_different_things_are_named_by_the_first_of_them() -> None:
    """Over hosts nobody refuses a transfer of the same size that is another one."""
    before, training, saving, later = (
        label_of(Operation.GATHER, unit, CALL_CODES[call])
        for unit, call in ((0, ""), (1, ""), (1, "full_state_dict"), (2, ""))
    )

    def waiting(rank, count, *labels):
        made = seen(rank, waits=(0, count, Operation.GATHER, 2), started=(count, 5, 5))
        return replace(made, labels=(labels, (), ()))

    found = find([waiting(0, 7, before, training, later), waiting(1, 6, before, saving)], NAMES)
    assert found is not None and found.certain
    assert found.text == (
        "ranks are out of step: after step 3 rank 0 starts the gather of unit 'blocks.0' in its training, rank 1 "
        "starts the gather of unit 'blocks.0' in full_state_dict(). full_state_dict() must be called on all ranks."
    )
    found = find([waiting(0, 7, before, training, later), waiting(1, 6, before, training)], NAMES)
    assert found is not None and "starts" not in found.text


def test_a_silent_host_is_named_once_with_its_ranks() -> None:
    waiting = seen(0, phase=Phase.FORWARD, waits=GATHER, started=AHEAD)
    found = find([waiting, seen(1, process="silent", call="initialize"), seen(2, process="silent")], NAMES)
    assert found is not None and found.absent == (1, 2) and not found.certain
    assert found.why == (
        "Nothing has come from node7 (ranks 1 and 2) for 12 s: its processes are gone or stopped, it is down, or the "
        "network to it is."
    )


def test_a_transfer_that_all_have_started_may_still_come() -> None:
    found = find([seen(rank, waits=GATHER, started=AHEAD) for rank in range(2)], NAMES)
    assert found is not None and not found.certain and "does not get through" in found.text


def test_ranks_in_words() -> None:
    assert [those(ranks) for ranks in ([3], [0, 1], [0, 1, 2, 5], [7, 1, 3])] == ["3", "0 and 1", "0 to 2 and 5",
                                                                                 "1, 3 and 7"]  # fmt: skip


def test_labels_can_be_read_back_and_old_ones_are_unknown() -> None:
    status = Status()
    numbers = [status.start(1, Operation.REDUCE, unit)[0] for unit in range(300)]
    assert numbers == list(range(1, 301))
    cells = status.cells
    assert label_at(cells, 1, 300) == label_of(Operation.REDUCE, 299, 0)
    assert label_at(cells, 1, 301) is None and label_at(cells, 1, 1) is None and label_at(cells, 0, 1) is None
    assert len(cells) == SIZE


def test_a_call_inside_another_is_the_outer_one() -> None:
    status = Status()
    with status.call("save_checkpoint"):
        with status.call("full_state_dict"):
            assert status.cells[Cell.CALL] == CALL_CODES["save_checkpoint"]
        assert status.cells[Cell.CALL] == CALL_CODES["save_checkpoint"]
    assert status.cells[Cell.CALL] == 0


class Cells(list):
    """Counts the numbers that are written."""

    written = 0

    def __setitem__(self, index, value) -> None:
        self.written += 1
        super().__setitem__(index, value)


def test_what_is_written_for_a_transfer_and_for_a_wait() -> None:
    cells = Cells([0] * SIZE)
    status = Status(cells)  # type: ignore[arg-type]
    number, label = status.start(0, Operation.GATHER, 1)
    assert cells.written == 2
    status.wait(0, number, label)
    status.go_on()
    assert cells.written == 2 + 5 + 2
    status.enter(Phase.FORWARD)
    assert cells.written == 2 + 5 + 2 + 2
