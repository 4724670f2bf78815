"""Gather and reduce over real processes, against a plain concatenation and a plain sum."""

from __future__ import annotations

import contextlib
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from shardline.comm import TransitionLog
from shardline.comm.peer_memory import PeerMemoryTransport
from shardline.comm.transport import AllToAllTransport, HostStagedTransport, NcclTransport, Work, add_in_order, choose
from tests.comm.sharing import leave, peers_here

KINDS = (AllToAllTransport, HostStagedTransport, PeerMemoryTransport)

CUTS = {
    2: {"equal": [0, 64, 128], "unequal": [0, 128, 192], "empty first": [0, 0, 64], "empty last": [0, 64, 64]},
    3: {"equal": [0, 64, 128, 192], "unequal": [0, 64, 256, 320], "empty middle": [0, 64, 64, 192]},
}
CASES = [(world, name) for world, cuts in CUTS.items() for name in cuts]


class Scratch:
    """Counts what is borrowed."""

    def __init__(self):
        self.out = []

    def borrow(self, numel, dtype):
        self.out.append(torch.full((numel,), 7.0).to(dtype))
        return self.out[-1]

    def give_back(self, buffer):
        self.out = [other for other in self.out if other is not buffer]


def values(rank, numel, dtype):
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank)).to(dtype)


@contextlib.contextmanager
def transport_of(kind):
    if kind is PeerMemoryTransport:
        peers = peers_here()
        yield peers.transports[0]
        leave(peers)
    else:
        inner = dist.group.WORLD
        all_to_all = AllToAllTransport(inner, TransitionLog())
        yield kind(all_to_all) if kind is HostStagedTransport else all_to_all


def gather_all(kind, cuts, dtype, in_place):
    rank, numel = dist.get_rank(), cuts[-1]
    buffer = torch.full((numel + 5,), -1.0, dtype=dtype)
    own = values(rank, numel, dtype)[cuts[rank] : cuts[rank + 1]]
    if in_place:
        buffer[cuts[rank] : cuts[rank + 1]] = own
    with transport_of(kind) as transport:
        transport.gather(0, buffer[:numel], cuts, None if in_place else own).wait()
    return buffer


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world", "cut"), CASES)
def test_gather_is_the_concatenation(ranks, world, cut, dtype, in_place) -> None:
    cuts = CUTS[world][cut]
    numel = cuts[-1]
    parts = [values(rank, numel, dtype)[low:high] for rank, (low, high) in enumerate(pairwise(cuts))]
    for kind in KINDS:
        for buffer in ranks(gather_all, world, kind, cuts, dtype, in_place):
            assert torch.equal(buffer[:numel], torch.cat(parts))
            assert bool((buffer[numel:] == -1).all()), "wrote behind the buffer"


def reduce_one(kind, cuts, dtype, out_dtype, add):
    rank, numel = dist.get_rank(), cuts[-1]
    buffer, scratch = values(rank, numel, dtype), Scratch()
    before = buffer.clone()
    out = torch.full((cuts[rank + 1] - cuts[rank],), 3.0, dtype=out_dtype)
    with transport_of(kind) as transport:
        transport.reduce(0, buffer, cuts, out, add=add, scratch=scratch).wait()
    return out, torch.equal(buffer, before), len(scratch.out)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("dtype", "out_dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize(("world", "cut"), CASES)
def test_reduce_is_the_sum_in_rank_order(ranks, world, cut, dtype, out_dtype, add) -> None:
    """Bit by bit, in the dtype of the result: bf16 values are never added up in bf16."""
    cuts = CUTS[world][cut]
    for kind in KINDS:
        results = ranks(reduce_one, world, kind, cuts, dtype, out_dtype, add)
        for (low, high), (out, kept, borrowed) in zip(pairwise(cuts), results, strict=True):
            terms = [values(rank, cuts[-1], dtype)[low:high].to(out_dtype) for rank in range(world)]
            start = torch.full((high - low,), 3.0)
            if kind is HostStagedTransport:
                expected = sum(terms[1:], terms[0]) + (start if add else 0)
            else:
                expected = sum(terms, start) if add else sum(terms[1:], terms[0])
            assert torch.equal(out, expected)
            assert kept and borrowed == 0


def in_flight_at_once(kind, cuts):
    """Three transitions are started before the first is waited for, in the same order everywhere."""
    rank, numel = dist.get_rank(), cuts[-1]
    scratch, buffer = Scratch(), torch.zeros(numel)
    buffer[cuts[rank] : cuts[rank + 1]] = rank + 1.0
    out = [torch.zeros(cuts[rank + 1] - cuts[rank]) for _ in range(2)]
    with transport_of(kind) as transport:
        works = [
            transport.gather(0, buffer, cuts),
            transport.reduce(0, torch.ones(numel), cuts, out[0], add=False, scratch=scratch),
            transport.reduce(0, torch.full((numel,), 2.0), cuts, out[1], add=False, scratch=scratch),
        ]
        for work in reversed(works):
            work.wait()
            work.wait()  # waiting again changes nothing
    return buffer, *out


@pytest.mark.parametrize("kind", [AllToAllTransport, PeerMemoryTransport])
def test_several_in_flight(ranks, kind) -> None:
    for buffer, one, two in ranks(in_flight_at_once, 2, kind, [0, 64, 192]):
        assert torch.equal(buffer, torch.cat([torch.ones(64), torch.full((128,), 2.0)]))
        assert bool((one == 2).all()) and bool((two == 4).all())


def test_a_work_lets_go_of_what_it_holds() -> None:
    calls = []
    work = Work((), lambda: calls.append(1), hold=torch.zeros(1))
    work.wait()
    work.wait()
    assert calls == [1] and work._hold is None


@pytest.mark.parametrize("alias", [None, 0, 1, 2])
@pytest.mark.parametrize(("dtype", "out_dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("terms", [1, 2, 3])
def test_sums_are_in_order_block_by_block_and_in_place(terms, dtype, out_dtype, alias) -> None:
    numel = 3 * (1 << 16) + 7
    parts = [values(term, numel, dtype) for term in range(terms)]
    expected = parts[0].to(out_dtype)
    for part in parts[1:]:
        expected = expected + part.to(out_dtype)
    if alias is not None and (alias >= terms or dtype is not out_dtype):
        return
    out = torch.full((numel,), 9.0, dtype=out_dtype) if alias is None else parts[alias]
    add_in_order(parts, out, add=False)
    assert torch.equal(out, expected)


def chosen():
    return type(choose(dist.group.WORLD, torch.device("cpu"))).__name__


def test_cpu_tensors_are_exchanged_over_gloo(ranks) -> None:
    assert ranks(chosen, 2) == ["AllToAllTransport"] * 2


def nccl_over_gloo(cuts, add, dtype):
    """What :class:`NcclTransport` calls exists on gloo too, so its bookkeeping can be seen without a GPU."""
    rank, numel = dist.get_rank(), cuts[-1]
    transport, scratch = NcclTransport(dist.group.WORLD, TransitionLog()), Scratch()
    buffer = torch.zeros(numel, dtype=dtype)
    buffer[cuts[rank] : cuts[rank + 1]] = rank + 1.0
    transport.gather(0, buffer, cuts).wait()
    out = torch.full((cuts[rank + 1] - cuts[rank],), 3.0)
    transport.reduce(0, torch.full((numel,), 2.0, dtype=dtype), cuts, out, add=add, scratch=scratch).wait()
    return buffer.float(), out, len(scratch.out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("cut", ["equal", "unequal"])
def test_nccl_transport_where_its_collectives_exist(ranks, cut, add, dtype) -> None:
    cuts = CUTS[2][cut]
    whole = torch.cat([torch.full((high - low,), i + 1.0) for i, (low, high) in enumerate(pairwise(cuts))])
    for buffer, out, borrowed in ranks(nccl_over_gloo, 2, cuts, add, dtype):
        assert torch.equal(buffer, whole)
        assert bool((out == (7.0 if add else 4.0)).all()) and borrowed == 0
