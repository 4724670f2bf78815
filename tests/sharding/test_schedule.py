"""When units move, told by units that do nothing but write down what they are asked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import pytest

from shardline.errors import DisagreementError
from shardline.sharding.schedule import Schedule
from shardline.sharding.unit import Residence


class FakeUnit:
    """Residence and holds as a unit keeps them; every call that would talk goes to a shared log."""

    def __init__(self, index: int, log: list[str], trainable: bool = True, users: tuple[str, ...] = ()) -> None:
        self.index, self.name, self.log, self.holds = index, f"b{index}", log, 0
        self.sharded, self.trainable = True, [object()] * trainable
        self.residence = Residence.SHARDED
        self.grads = self.late = False
        self.comm = SimpleNamespace(world_size=2)
        root = f"b{index}"
        self.plan = SimpleNamespace(roots=(root,), users=(root, *users), numel=100)

    def hold(self) -> None:
        self.holds += 1

    def unhold(self) -> None:
        self.holds -= 1

    def unshard(self) -> None:
        if self.residence is Residence.SHARDED:
            self.log.append(f"gather {self.index}")
            self.residence = Residence.GATHERING

    def wait_for_unshard(self) -> None:
        self.unshard()
        self.residence = Residence.GATHERED

    def join_unshard(self) -> None:
        self.log.append(f"join {self.index}")

    def reshard(self) -> None:
        if self.sharded and not self.holds and self.residence is not Residence.SHARDED:
            self.log.append(f"release {self.index}")
            self.residence = Residence.SHARDED

    def seal_keeping_buffer(self) -> None:
        if self.residence is Residence.GATHERED:
            self.residence = Residence.GATHERED_SEALED

    def reduce_scatter(self, factor: float) -> None:
        self.log.append(f"reduce {self.index}")
        self.grads = False

    def accumulate(self, factor: float) -> None:
        self.log.append(f"fold {self.index}")
        self.grads = False

    is_local = False

    def has_reduced(self) -> bool:
        return True

    def wait_for_reduce(self) -> None:
        self.log.append(f"finish {self.index}")

    def has_uncollected(self) -> bool:
        return self.grads


class Drive:
    """A model of blocks driven through a schedule: forward uses blocks in an order, backward in the reverse."""

    def __init__(
        self,
        count: int = 4,
        prefetch: bool = False,
        reshard: bool = True,
        frozen: tuple[int, ...] = (),
        kept: int = 0,
        alike: bool = True,  # whether the other rank does just what this one does
        sizes: Sequence[int] = (),
        on_host: bool = False,
    ) -> None:
        self.alike = alike
        self.asked = 0
        self.log: list[str] = []
        self.units = [FakeUnit(i, self.log, i not in frozen) for i in range(count)]
        for unit, size in zip(self.units, sizes, strict=False):
            unit.plan.numel = size
        self.schedule = Schedule(
            self.units,  # type: ignore[arg-type]
            self.ask,
            prefetch=prefetch,
            reshard_after_forward=reshard,
            max_live=kept,
            on_host=on_host,
        )

    def ask(self, row: Sequence[int]) -> list[list[int]]:
        self.asked += 1
        want, issued, digest = row
        return [[want, issued, digest], [want, issued, digest + (not self.alike)]]

    def take(self, *words: str) -> list[str]:
        """The log so far, without other operations, and clear it."""
        found = [entry for entry in self.log if not words or entry.split()[0] in words]
        self.log.clear()
        return found

    def forward(self, *order: int, grad: bool = True) -> None:
        self.schedule.begin_forward(with_grad=grad)
        for index in order:
            self.call(index, grad)
        self.schedule.end_forward()

    def call(self, index: int, grad: bool = True) -> None:
        unit = self.units[index]
        self.schedule.pre_forward(unit)
        assert unit.residence is Residence.GATHERED
        if grad:
            self.schedule.expect_backward(unit, 1)
        self.schedule.post_forward(unit)

    def backward(self, *order: int, reducing: bool = True, end: bool = True) -> None:
        self.schedule.begin_backward(reducing=reducing, factor=1.0)
        for index in order:
            unit = self.units[index]
            self.schedule.pre_backward(unit)
            assert unit.residence is Residence.GATHERED
            unit.grads = bool(unit.trainable)
            self.schedule.post_backward(unit, at_once=True)
        if end:
            self.schedule.end_backward()

    def step(self) -> None:
        self.schedule.finish_reductions()
        self.schedule.end_step()
        self.log.clear()

    def train(self, *order: int) -> None:
        self.forward(*order)
        self.backward(*order[::-1])
        self.step()


# --- gathers ----------------------------------------------------------------------------------------------------------


def test_a_unit_is_gathered_at_its_use_and_released_after_it() -> None:
    """The last one stays, hidden, for the backward that begins with it."""
    drive = Drive(3)
    drive.forward(0, 1, 2)
    assert drive.take() == ["gather 0", "release 0", "gather 1", "release 1", "gather 2"]
    assert drive.units[2].residence is Residence.GATHERED_SEALED
    drive.backward(2, 1, 0)
    assert drive.take("gather", "release") == ["release 2", "gather 1", "release 1", "gather 0", "release 0"]


def test_prefetch_gathers_the_next_before_this_one_computes() -> None:
    """Once it is known what comes next."""
    drive = Drive(3, prefetch=True)
    drive.train(0, 1, 2)
    drive.forward(0, 1, 2)
    assert drive.take() == ["gather 0", "gather 1", "release 0", "gather 2", "release 1"]
    drive.backward(2, 1, 0)
    assert drive.take("gather") == ["gather 1", "gather 0"]
    drive.schedule.end_step()
    drive.forward(0, 1, 2)
    drive.forward(grad=False)  # lets the last one go
    drive.log.clear()
    drive.backward(2, 1, 0)
    assert drive.take("gather", "reduce") == [
        "gather 2", "gather 1", "reduce 2", "gather 0", "reduce 1", "reduce 0"
    ]  # fmt: skip


def test_a_second_backward_through_a_graph_has_an_order_of_its_own() -> None:
    """Nothing tells when its gradients are complete, so it reduces at its end."""
    drive = Drive(2)
    for _ in range(3):
        drive.forward(0, 1)
        drive.backward(1, 0)
        drive.log.clear()
        drive.backward(1, 0)
        found = drive.take("gather", "reduce")
        assert not drive.schedule.end_step(), "it was negotiated, not made to follow the first one's"
    assert found == ["gather 1", "gather 0", "reduce 1", "reduce 0"]


def test_without_resharding_backward_gathers_nothing() -> None:
    drive = Drive(3, reshard=False)
    drive.forward(0, 1, 2)
    assert drive.take() == ["gather 0", "gather 1", "gather 2"]
    drive.backward(2, 1, 0)
    assert "gather" not in " ".join(drive.log) and sorted(drive.take("release")) == [f"release {i}" for i in range(3)]


SKIPS = [(0, 1, 2, 3), (0, 2, 3), (1, 3), (3,), (0,), ()]


@pytest.mark.parametrize("kept", [0, 150, 10**9])
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("skipping", SKIPS)
def test_a_rank_that_skips_gathers_what_the_others_gather(skipping, prefetch, kept) -> None:
    """What is issued in an agreed order does not depend on which blocks this rank uses."""
    orders = []
    for used in ((0, 1, 2, 3), skipping):
        drive = Drive(4, prefetch=prefetch, kept=kept)
        drive.train(0, 1, 2, 3)
        asked = drive.asked
        drive.forward(*used)
        forward = drive.take("gather", "join")
        drive.backward(*used[::-1])
        orders.append(
            [entry.replace("join", "gather") for entry in (*forward, *drive.take("gather", "join", "reduce"))]
        )
        assert all(unit.residence is Residence.SHARDED for unit in drive.units)
        assert drive.asked == asked
        assert drive.schedule.end_step() == (used != (0, 1, 2, 3))
    assert orders[0] == orders[1]
    gathers = [entry for entry in orders[0] if entry.startswith("gather")]
    assert gathers == [f"gather {i}" for i in (0, 1, 2, 3, 2, 1, 0)]


def test_an_evaluation_gathers_only_what_it_uses() -> None:
    drive = Drive(4)
    for _ in range(3):
        drive.forward(1, 3, grad=False)
        assert drive.take() == ["gather 1", "release 1", "gather 3", "release 3"]


def test_an_evaluation_of_all_units_asks_once() -> None:
    drive = Drive(3)
    asked = []
    for _ in range(3):
        drive.forward(1, 0, 2, grad=False)
        assert drive.take("gather") == ["gather 1", "gather 0", "gather 2"]
        asked.append(drive.asked)
    assert asked[0] == asked[1] == asked[2] > 0


@pytest.mark.parametrize(("kept", "found"), [(0, 0), (100, 1), (200, 2)])
def test_what_was_passed_over_is_kept_while_there_is_room(kept, found) -> None:
    """A rank that jumps ahead takes part in the gathers before, and may need them itself a moment later."""
    drive = Drive(3, kept=kept)
    drive.train(0, 1, 2)
    drive.schedule.begin_forward(with_grad=True)
    drive.call(2)
    assert drive.take("gather") == ["gather 0", "gather 1", "gather 2"]
    for index in (1, 0)[:found]:
        drive.call(index)
    assert not drive.take("gather")
    if found < 2:
        with pytest.raises(DisagreementError, match="needed again after it was released"):
            drive.call((1, 0)[found])
    drive.schedule.end_forward()
    assert drive.schedule.end_step()


def test_another_order_is_taken_over_at_a_step() -> None:
    drive = Drive(3)
    drive.train(2, 0, 1)
    drive.forward(2, 0, 1)
    assert drive.take("gather") == ["gather 2", "gather 0", "gather 1"]
    drive.backward(1, 0, 2)
    assert drive.take("gather") == ["gather 0", "gather 2"]


def test_an_order_that_ranks_did_not_share_is_not_followed() -> None:
    drive = Drive(3, alike=False)
    for _ in range(4):
        asked = drive.asked
        drive.forward(2, 1, 0)
        drive.backward(0, 1, 2)
        assert drive.take("gather") == [f"gather {i}" for i in (2, 1, 0, 0, 1)], "unit 2 stayed, as it is the last"
        assert drive.asked > asked
        drive.step()


def test_as_many_steps_are_negotiated_as_ranks_have_differed() -> None:
    drive = Drive(2)
    drive.train(0, 1)
    for differed in (1, 2, 3):
        drive.alike = False
        drive.schedule.negotiate_next() if differed == 1 else drive.train(0, 1)
        drive.alike = True
        for _ in range(differed):
            asked = drive.asked
            drive.train(0, 1)
            assert drive.asked > asked
        asked = drive.asked
        drive.train(0, 1)
        assert drive.asked == asked
        drive.schedule.negotiate_next()
        drive.schedule._agreement._disagreements -= 1


def test_a_window_of_several_forwards_has_an_order_for_each() -> None:
    """The second one follows the first at first; then it has its own."""
    drive = Drive(2, kept=200)
    for turn in range(4):
        asked = drive.asked
        drive.forward(0, 1)
        drive.backward(1, 0)
        drive.forward(1, 0)
        drive.backward(0, 1)
        left = drive.schedule.end_step()
        assert left == (turn == 0)
        if left:
            drive.schedule.negotiate_next()
        assert (drive.asked > asked) == (turn < 2)


def test_a_unit_used_twice_stays_until_the_second_use_once_that_is_known() -> None:
    drive = Drive(2)
    for turn in range(2):
        drive.forward(0, 1, 0)
        found = drive.take("gather", "release")
        drive.backward(0, 1)
        drive.step()
        if turn == 1:
            assert found == ["gather 0", "gather 1", "release 1"]


def test_nested_uses_hold_a_unit() -> None:
    drive = Drive(2)
    unit, schedule = drive.units[0], drive.schedule
    schedule.begin_forward(with_grad=True)
    schedule.pre_forward(unit)
    schedule.pre_forward(unit)
    schedule.post_forward(unit)
    assert unit.residence is Residence.GATHERED
    schedule.post_forward(unit)
    assert unit.residence is Residence.SHARDED and unit.holds == 0


def test_what_was_used_again_in_a_forward_stays_through_it() -> None:
    """A tied embedding is used first and last."""
    drive = Drive(2)
    for gathers in (["gather 0", "gather 1"], ["gather 0", "gather 1"]):
        drive.train(0, 1, 0)
        drive.forward(0, 1, 0)
        assert drive.take("gather") == gathers
        drive.backward(0, 1)
        drive.step()


def test_a_use_outside_the_forward_of_the_model() -> None:
    """``model.encode()``: gathered and released with each module."""
    drive = Drive(2)
    drive.call(1)
    drive.call(0)
    assert drive.take() == ["gather 1", "release 1", "gather 0", "release 0"]


def test_a_touch_gathers_inside_a_forward_only() -> None:
    drive = Drive(2)
    assert not drive.schedule.on_sealed_access(drive.units[0])
    drive.schedule.begin_forward(with_grad=True)
    assert drive.schedule.on_sealed_access(drive.units[1])
    assert drive.take("gather") == ["gather 1"]
    drive.schedule.end_forward()
    assert not drive.schedule.on_sealed_access(drive.units[0])
    assert [unit.residence for unit in drive.units] == [Residence.SHARDED, Residence.GATHERED_SEALED]


def test_a_forward_within_a_forward_is_one_forward() -> None:
    drive = Drive(2)
    drive.schedule.begin_forward(with_grad=True)
    drive.call(0)
    drive.schedule.begin_forward(with_grad=True)
    drive.call(1)
    drive.schedule.end_forward()
    assert drive.take("gather") == ["gather 0", "gather 1"]


def test_the_first_backward_reduces_in_the_reverse_of_the_first_forward_if_all_ranks_saw_the_same() -> None:
    for alike, order in ((True, [1, 0, 2]), (False, [2, 1, 0])):
        drive = Drive(3, alike=alike)
        drive.forward(2, 0, 1)
        drive.log.clear()
        drive.backward(1, 0, 2)
        assert drive.take("reduce") == [f"reduce {i}" for i in order]


# --- reductions -------------------------------------------------------------------------------------------------------


def test_reductions_begin_in_the_reverse_of_the_plan_whatever_is_ready_first() -> None:
    drive = Drive(3)
    drive.forward(0, 1, 2)
    drive.log.clear()
    drive.backward(0, 1, end=False)
    assert drive.take("reduce") == [], "both wait for their turn"
    unit = drive.units[2]
    drive.schedule.pre_backward(unit)
    drive.schedule.post_backward(unit, at_once=True)
    assert drive.take("reduce") == ["reduce 2", "reduce 1", "reduce 0"]


def test_reductions_overlap_backward() -> None:
    drive = Drive(3)
    drive.forward(0, 1, 2)
    drive.log.clear()
    drive.backward(2, 1, 0)
    log = drive.take("reduce", "gather")
    assert log == ["reduce 2", "gather 1", "reduce 1", "gather 0", "reduce 0"]


@pytest.mark.parametrize(("sizes", "together"), [((100,) * 6, 1), ((30, 30, 100, 30, 30, 30), 3)])
def test_what_is_in_flight_is_no_larger_than_the_largest_unit(sizes, together) -> None:
    drive = Drive(6, sizes=sizes)
    drive.forward(*range(6))
    drive.log.clear()
    drive.backward(*range(5, -1, -1))
    flying: set[int] = set()
    most = 0
    for entry in drive.take("reduce", "finish"):
        flying ^= {int(entry.split()[1])}
        assert sum(sizes[index] for index in flying) <= 100
        most = max(most, len(flying))
    assert most == together
    drive.schedule.finish_reductions()
    assert {f"finish {index}" for index in flying} == set(drive.take("finish"))


def test_on_the_host_what_is_over_is_freed_before_the_next_gradients_come() -> None:
    drive = Drive(4, sizes=(1, 1, 1, 100), on_host=True)
    drive.forward(0, 1, 2, 3)
    over = {3, 2}
    for unit in drive.units:
        unit.has_reduced = partial(over.__contains__, unit.index)  # type: ignore[method-assign]
    drive.log.clear()
    drive.backward(3, 2, 1, 0, end=False)
    assert drive.take("reduce", "finish") == [
        "reduce 3", "finish 3", "reduce 2", "finish 2", "reduce 1", "reduce 0"
    ]  # fmt: skip
    drive = Drive(4, sizes=(1, 1, 1, 100), on_host=False)
    drive.forward(0, 1, 2, 3)
    drive.log.clear()
    drive.backward(3, 2, 1, 0, end=False)
    assert "finish 2" not in drive.take("finish")


def test_a_rank_that_jumps_ahead_reduces_what_it_does_not_have_yet() -> None:
    """The others issue nothing after it before that; what it gets later is late."""
    drive = Drive(3, kept=300)
    drive.train(0, 1, 2)
    drive.forward(0, 1, 2)
    drive.log.clear()
    drive.backward(0, 1, end=False)
    assert drive.take("gather", "reduce") == [
        "reduce 2", "gather 1", "reduce 1", "gather 0", "reduce 0"
    ]  # fmt: skip
    drive.schedule.end_backward()
    assert drive.take("fold") == ["fold 1"] and not drive.schedule.wrong_hints
    assert drive.schedule.end_step()


def test_the_order_seen_is_the_next_reduce_order() -> None:
    drive = Drive(3)
    drive.forward(0, 1, 2)
    drive.backward(0, 2, 1)
    drive.step()
    drive.forward(0, 1, 2)
    drive.log.clear()
    drive.backward(0, 2, 1)
    assert drive.take("reduce") == ["reduce 0", "reduce 2", "reduce 1"]


def test_an_unused_unit_does_not_hold_up_the_others() -> None:
    """It is reduced at its turn as zeros, without waiting for the end."""
    drive = Drive(3)
    drive.forward(0, 1)
    drive.log.clear()
    drive.backward(1, end=False)
    assert drive.take("reduce") == ["reduce 2", "reduce 1"]
    drive.schedule.end_backward()
    assert drive.take("reduce") == ["reduce 0"]


def test_a_unit_called_twice_is_ready_after_both() -> None:
    drive = Drive(1)
    drive.forward(0, 0)
    drive.log.clear()
    drive.backward(0, end=False)
    assert drive.take("reduce") == []
    drive.schedule.post_backward(drive.units[0], at_once=True)
    assert drive.take("reduce") == ["reduce 0"]


def test_a_call_without_differentiable_inputs_is_over_at_the_end() -> None:
    drive = Drive(2)
    drive.schedule.begin_forward(with_grad=True)
    for unit, inputs in zip(drive.units, (0, 1), strict=True):
        drive.schedule.pre_forward(unit)
        drive.schedule.expect_backward(unit, inputs)
        drive.schedule.post_forward(unit)
    drive.schedule.end_forward()
    drive.log.clear()
    drive.backward(1, end=False)
    assert drive.take("reduce") == ["reduce 1"]
    drive.schedule.end_backward()
    assert drive.take("reduce") == ["reduce 0"]


def test_the_hint_of_a_leaf_counts_from_the_next_event() -> None:
    """A hook on a leaf runs before the gradient of what used it has reached the parameters."""
    drive = Drive(2)
    drive.forward(0, 1)
    drive.backward(end=False)
    drive.log.clear()
    drive.schedule.post_backward(drive.units[1], at_once=False)
    assert drive.take("reduce") == []
    drive.schedule.pre_backward(drive.units[0])
    assert drive.take("reduce") == ["reduce 1"]


def test_one_call_without_differentiable_inputs_is_enough_to_wait() -> None:
    """Of two calls one has an input: when its gradient is complete, the other's may still come."""
    drive = Drive(1)
    unit = drive.units[0]
    drive.schedule.begin_forward(with_grad=True)
    for inputs in (0, 1):
        drive.schedule.pre_forward(unit)
        drive.schedule.expect_backward(unit, inputs)
        drive.schedule.post_forward(unit)
    drive.schedule.end_forward()
    drive.log.clear()
    drive.backward(0, end=False)
    assert drive.take("reduce") == []
    drive.schedule.end_backward()
    assert drive.take("reduce") == ["reduce 0"]


def test_late_gradients_are_kept_and_their_unit_is_not_trusted_again() -> None:
    drive = Drive(2)
    drive.forward(0, 1)
    drive.backward(1, 0, end=False)
    drive.units[1].grads = True  # after its reduction
    drive.log.clear()
    drive.schedule.end_backward()
    assert drive.take("fold", "reduce") == ["fold 1"]
    assert drive.schedule.wrong_hints == {1}
    drive.step()
    drive.schedule.negotiate_next({0})  # another rank's
    for _ in range(2):
        drive.forward(0, 1)
        drive.log.clear()
        drive.backward(1, 0, end=False)
        assert drive.take("reduce") == [], "their hints mean nothing any more, so they wait for the end"
        drive.schedule.end_backward()
        assert sorted(drive.take("reduce")) == ["reduce 0", "reduce 1"]
        drive.step()


def test_without_reducing_gradients_are_folded() -> None:
    drive = Drive(2)
    drive.forward(0, 1)
    drive.log.clear()
    drive.backward(1, 0, reducing=False)
    log = drive.take("fold", "reduce")
    assert log[:2] == ["fold 1", "fold 0"] and not any(entry.startswith("reduce") for entry in log)


def test_frozen_units_are_gathered_for_backward_and_not_reduced() -> None:
    drive = Drive(3, frozen=(1,))
    drive.forward(0, 1, 2)
    drive.log.clear()
    drive.backward(2, 1, 0)
    assert drive.take("gather", "reduce") == ["reduce 2", "gather 1", "gather 0", "reduce 0"]


def test_recomputation_in_backward_gathers_what_backward_gathers() -> None:
    """Checkpointing uses a unit inside backward: one gather, released by backward and not by that forward."""
    drive = Drive(2)
    drive.forward(0, 1)
    drive.log.clear()
    drive.schedule.begin_backward(reducing=True, factor=1.0)
    for unit in reversed(drive.units):
        for _ in ("the forward that runs again", "what it saved"):
            drive.schedule.pre_backward(unit)
        drive.schedule.post_backward(unit, at_once=True)
    drive.schedule.end_backward()
    assert drive.take("gather", "release") == ["release 1", "gather 0", "release 0"]


def test_an_error_in_backward_leaves_nothing_behind() -> None:
    drive = Drive(3)
    for _ in range(2):
        drive.forward(0, 1, 2)
        drive.backward(2, end=False)
        drive.schedule.abort_backward()
        assert not drive.schedule.in_backward and all(unit.residence is Residence.SHARDED for unit in drive.units)
        drive.log.clear()
        drive.forward(0, 1, 2)
        assert drive.take("gather") == ["gather 0", "gather 1", "gather 2"]
        drive.backward(2, 1, 0)
        assert drive.take("reduce") == ["reduce 2", "reduce 1", "reduce 0"]
        drive.step()


def test_half_an_order_is_not_adopted() -> None:
    """A backward fails, the user catches that and steps with what the micro-steps before have given."""
    drive = Drive(3)
    drive.forward(0, 1, 2)
    drive.backward(2, 1, 0)
    drive.forward(0, 1, 2)
    drive.backward(2, end=False)
    drive.schedule.abort_backward()
    drive.step()
    drive.forward(0, 1, 2)
    drive.log.clear()
    drive.backward(2, 1, 0)
    assert drive.take("reduce") == ["reduce 2", "reduce 1", "reduce 0"]
