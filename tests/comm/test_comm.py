"""Transitions that are counted and logged, one row a step, and the messages at set-up."""

from __future__ import annotations

import threading
import time
from collections import Counter
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardline
from shardline.comm import DONE, Comm, Group, digest
from shardline.errors import DisagreementError
from shardline.sharding.buffer import BufferPool
from shardline.testing import run_distributed

CPU = torch.device("cpu")


def comm_here():
    return Comm(dist.group.WORLD, CPU)


class Communicator:
    """Ends when all have been told to, as where the device is busy with another one until that is told."""

    def __init__(self, together: threading.Barrier, ended: list[object]) -> None:
        self.together, self.ended = together, ended

    def abort(self) -> None:
        self.together.wait(60)
        self.ended.append(self)


def test_communicators_are_aborted_at_once() -> None:
    comm = Comm(None, CPU)
    together, ended = threading.Barrier(3), []
    comm._groups = SimpleNamespace(made=[Communicator(together, ended) for _ in range(2)])
    comm._abort()  # does not wait: the watching thread goes on
    together.wait(60)
    while len(ended) < 2:
        time.sleep(0.01)


# --- a single process -------------------------------------------------------------------------------------------------


def test_a_single_process_needs_no_process_group() -> None:
    comm = Comm(None, CPU)
    buffer = torch.arange(64.0)
    assert comm.gathers.gather(0, buffer, [0, 64]) is DONE and torch.equal(buffer, torch.arange(64.0))
    assert torch.equal(comm.all_gather_vector(torch.tensor([1.0, 2.0])), torch.tensor([[1.0, 2.0]]))
    assert comm.messages.exchange({"a": (1, 2)}) == [{"a": [1, 2]}]  # as text makes it
    comm.messages.agree({"anything": 1})
    comm.messages.broadcast([buffer])
    assert comm.shard == comm.data == Group(0, 1) and not comm.log.counts and not any(comm.log.drain().values())
    comm.close()


def test_a_single_process_reduces_nothing() -> None:
    with pytest.raises(AssertionError, match="aliases"):
        Comm(None, CPU).reductions.reduce(
            0, torch.zeros(64), [0, 64], torch.zeros(64), add=False, scratch=BufferPool(CPU)
        )


# --- transitions ------------------------------------------------------------------------------------------------------


def talk():
    comm, pool = comm_here(), BufferPool(CPU)
    for unit, numel in ((4, 128), (7, 256)):
        comm.gathers.gather(unit, torch.zeros(numel), [0, numel // 2, numel]).wait()
    comm.reductions.reduce(4, torch.ones(128), [0, 64, 128], torch.zeros(64), add=False, scratch=pool).wait()
    comm.gathers.gather(4, torch.zeros(128), [0, 64, 128]).wait()
    first, second = comm.log.drain(), comm.log.drain()
    counts, elements = Counter(comm.log.counts), Counter(comm.log.elements)
    comm.close()
    plain = [{operation: list(units) for operation, units in log.items()} for log in (first, second)]
    return counts, elements, *plain


def test_transitions_are_counted_and_logged(ranks) -> None:
    for counts, elements, log, after in ranks(talk, 2):
        assert counts == {("gather", 4): 2, ("gather", 7): 1, ("reduce", 4): 1}
        assert elements == {"gather": 512, "reduce": 128}
        assert log == {"gather": [4, 7, 4], "reduce": [4]}
        assert after == {"gather": [], "reduce": []}


def test_the_digest_sees_order_and_length_and_fits_a_float() -> None:
    logs = [[[]], [[0]], [[1]], [[0, 1]], [[1, 0]], [[0, 1, 0]], [[2**40]], [[0], [1]], [[0, 1], []], [[], [0, 1]]]
    assert len({digest(*log) for log in logs}) == len(logs)
    assert digest([3, 1], [2]) == digest((3, 1), (2,))
    assert all(int(float(digest(*log))) == digest(*log) for log in logs)


def other_line():
    """Values go round on a second line while a gather of the first is under way, begun in another order."""
    comm = comm_here()
    line = comm.channel()
    buffer = torch.full((128,), float(comm.data.rank))
    if comm.data.rank:
        values = line.exchange(comm.data.rank)
        comm.gathers.gather(0, buffer, [0, 64, 128]).wait()
    else:
        work = comm.gathers.gather(0, buffer, [0, 64, 128])
        values = line.exchange(comm.data.rank)
        work.wait()
    line.close()
    comm.close()
    return values, buffer[::64].tolist(), (line.rank, line.world_size)


def test_another_line_between_the_same_ranks(ranks) -> None:
    for rank, found in enumerate(ranks(other_line, 2, timeout=30)):
        assert found == ([0, 1], [0.0, 1.0], (rank, 2))


def gathers_and_reductions_cross():
    """Gathers and reductions each keep an order; how the two mix may differ between ranks."""
    comm, pool = comm_here(), BufferPool(CPU)
    buffer, out = torch.full((128,), float(comm.data.rank)), torch.zeros(64)

    def gather():
        return comm.gathers.gather(0, buffer, [0, 64, 128])

    def reduce():
        return comm.reductions.reduce(0, torch.ones(128), [0, 64, 128], out, add=False, scratch=pool)

    works = [start() for start in ((gather, reduce) if comm.data.rank else (reduce, gather))]
    for work in works:
        work.wait()
    comm.close()
    return buffer, out


def test_gathers_and_reductions_do_not_wait_for_each_other(ranks) -> None:
    for buffer, out in ranks(gathers_and_reductions_cross, 2, timeout=30):
        assert torch.equal(buffer, torch.cat([torch.zeros(64), torch.ones(64)])) and bool((out == 2).all())


def after_close():
    comm = comm_here()
    comm.close()
    said = []
    for call in (
        lambda: comm.gathers.gather(0, torch.zeros(128), [0, 64, 128]),
        lambda: comm.all_gather_vector(torch.zeros(1)),
        lambda: comm.messages.exchange(1),
        lambda: comm.messages.broadcast([torch.zeros(1)]),
    ):
        try:
            call()
            said.append(None)
        except Exception as error:
            said.append(type(error).__name__)
    return said


def test_collectives_after_close_raise(ranks) -> None:
    for said in ranks(after_close, 2):
        assert None not in said


# --- rows, broadcasts, values -----------------------------------------------------------------------------------------


def stack_rows():
    comm = comm_here()
    rows = comm.all_gather_vector(
        torch.tensor([comm.data.rank / 3, float(2**31 + comm.data.rank)], dtype=torch.float64)
    )
    comm.close()
    return rows


@pytest.mark.parametrize("world", [2, 3])
def test_rows_are_stacked_in_rank_order(ranks, world) -> None:
    expected = torch.tensor([[rank / 3, 2**31 + rank] for rank in range(world)], dtype=torch.float64)
    for rows in ranks(stack_rows, world):
        assert torch.equal(rows, expected)


def odd_tensors(rank):
    g = torch.Generator().manual_seed(rank)
    wide = torch.randn(6, 8, generator=g)
    return {
        "scalar": torch.randn((), generator=g),
        "empty": torch.zeros(0, 4),
        "bool": torch.rand(5, generator=g) < 0.5,
        "int": torch.randint(9, (2, 3), generator=g),
        "fp16": torch.randn(3, generator=g).half(),
        "bf16": torch.randn(3, 3, generator=g).bfloat16(),
        "fp64": torch.randn(3, generator=g).double(),
        "complex": torch.randn(3, generator=g, dtype=torch.complex64),
        "transposed": torch.randn(3, 5, generator=g).t(),
        "channels_last": torch.randn(2, 3, 4, 4, generator=g).to(memory_format=torch.channels_last),
        "columns": wide[:, ::2],
        "middle": wide[2:4],
        "one of size 1": torch.randn(4, 6, generator=g)[:, :1],
        "parameter": nn.Parameter(torch.randn(4, generator=g)),
        "byte at an odd place": torch.randint(9, (7,), generator=g, dtype=torch.uint8)[1:4],
    }


def broadcast_odd(source):
    comm = comm_here()
    tensors = odd_tensors(comm.data.rank)
    strides = {name: tensor.stride() for name, tensor in tensors.items()}
    around = tensors["middle"]._base.clone()
    comm.messages.broadcast(list(tensors.values()), source)
    comm.close()
    same = all(tensor.stride() == strides[name] for name, tensor in tensors.items())
    base = tensors["middle"]._base
    untouched = torch.equal(base[:2, 1::2], around[:2, 1::2]) and torch.equal(base[4:, 1::2], around[4:, 1::2])
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}, same, untouched


@pytest.mark.parametrize("source", [0, 1])
def test_broadcast_of_odd_tensors(ranks, source) -> None:
    expected = odd_tensors(source)
    for got, same, untouched in ranks(broadcast_odd, 2, source):
        assert same and untouched
        for name, value in expected.items():
            if name != "columns":  # it shares memory with "middle": which is sent last wins
                assert torch.equal(got[name], value), name


def exchange_values():
    comm = comm_here()
    mine = {"rank": comm.data.rank, "long": "é" * (comm.data.rank * 5000), "nested": [None, True, 0.1]}
    found = comm.messages.exchange(mine)
    comm.close()
    return found


def test_exchange_of_values_of_different_lengths(ranks) -> None:
    for found in ranks(exchange_values, 3):
        assert found == [{"rank": r, "long": "é" * (r * 5000), "nested": [None, True, 0.1]} for r in range(3)]


def disagree(values):
    comm = comm_here()
    try:
        comm.messages.agree(values[comm.data.rank])
        return None
    except DisagreementError as error:
        return str(error)
    finally:
        comm.close()


def test_agreement_is_silent(ranks) -> None:
    assert ranks(disagree, 2, [{"a": [1, 2], "b": (1,)}, {"a": (1, 2), "b": [1]}]) == [None, None]


def test_disagreement_names_key_ranks_and_both_values(ranks) -> None:
    same, other = {"the seed": 1, "the shape": [4, 4]}, {"the seed": 1, "the shape": [4, 5]}
    for said in ranks(disagree, 3, [same, same, other]):
        assert "the shape" in said and "rank 0 has [4, 4]" in said and "rank 2 has [4, 5]" in said
        assert "the seed" not in said


@pytest.mark.parametrize(
    "values",
    [
        [{"a": 1, "b": 2}, {"a": 1}],
        [{"a": 1}, {"a": 1, "b": 2}],
    ],
)
def test_a_key_that_only_some_have_is_a_disagreement(ranks, values) -> None:
    for said in ranks(disagree, 2, values):
        assert said is not None and " b:" in said


def test_long_values_are_cut(ranks) -> None:
    for said in ranks(disagree, 2, [{"a": "x" * 10_000}, {"a": "y" * 10_000}]):
        assert len(said) < 1000


# --- small collectives, and how long they wait -----------------------------------------------------------------------


def all_gather_ints():
    found = []
    for transport in ("auto", "gloo"):
        comm = Comm(dist.group.WORLD, CPU, transport=transport)
        found += [comm.all_gather_ints((dist.get_rank(), turn, 2**40)) for turn in range(3)]
        comm.close()
    return found


def test_ints_are_in_rank_order(ranks) -> None:
    for found in ranks(all_gather_ints, 3):
        assert found == [[[rank, turn, 2**40] for rank in range(3)] for turn in range(3)] * 2


def timeouts():
    given = timedelta(seconds=17)
    parent = dist.new_group(timeout=given)
    found = []
    for transport in ("auto", "gloo"):
        comm = Comm(parent, CPU, transport=transport)
        channel = comm.channel()
        groups = [*comm._groups.made, *channel._own.made]
        found += [group._get_backend(CPU).options._timeout == given for group in groups]
        found += [] if comm._peers is None else [comm._peers.watch.settings.timeout == 17]
        channel.close()
        comm.close()
    dist.destroy_process_group(parent)
    return found


def test_every_wait_has_the_timeout_of_the_group_that_was_given(ranks) -> None:
    for found in ranks(timeouts, 2):
        assert len(found) >= 6 and all(found)


def _groups_ended_first(transport):
    model = nn.Linear(4, 4)
    config = {"zero_optimization": {"stage": 3}, "communication_transport": transport}
    engine = shardline.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), config)
    dist.destroy_process_group()
    engine.destroy()
    return [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("transport", ["auto", "gloo"])
def test_an_engine_is_destroyed_after_the_script_ended_all_groups(transport) -> None:
    for threads in run_distributed(_groups_ended_first, 2, transport):
        assert "shardline-watch" not in threads
