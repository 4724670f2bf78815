"""What is checked between ranks: their memory, their clocks, the engine's collectives, and training at each stage."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardline.comm import Comm, Group, TransitionLog
from shardline.comm.exchange import all_gather_json
from shardline.comm.peer_memory import PeerMemoryTransport, attach
from shardline.comm.transport import HostStagedTransport, NcclTransport, Transport
from shardline.doctor.verdict import OK, SLOW
from shardline.engine.initialize import initialize
from shardline.runtime.topology import discover

__all__ = ["clocks", "collectives", "readable", "train"]

_NUMEL = 1 << 22  # 16 MB of fp32
_ROUNDS = 4
_TIMEOUT = timedelta(seconds=10)


def _exchange(value: Any) -> list[Any]:
    group = dist.group.WORLD
    return [value] if group is None or dist.get_world_size() == 1 else all_gather_json(value, group)


def readable() -> tuple[str, str]:
    """Ranks of this host read each other's memory."""
    if discover().device.type != "cpu":
        return OK, "not needed: ranks compute on accelerators"
    if dist.get_world_size() == 1:
        return OK, "a single rank"
    hosts = {str(host) for host in _exchange(platform.node())}
    if len(hosts) > 1:
        return OK, f"not possible between {len(hosts)} hosts: gloo is used"
    group = Group.of(dist.group.WORLD)
    peers = attach(group, _exchange, _TIMEOUT, TransitionLog(), wanted=True)
    if peers is not None:
        peers.close()
        return OK, "each rank reads that of the others (process_vm_readv)"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return SLOW, f"only on Linux on x86-64, and this is {sys.platform} on {platform.machine()}: gloo is used"
    return SLOW, (
        "ranks cannot read each other's memory (process_vm_readv), so the slower gloo is used. "
        "A container allows it by --cap-add SYS_PTRACE, or by a seccomp profile with this call"
    )


def clocks() -> list[float]:
    """The time of this rank's clock, read several times as soon as all ranks have met."""
    times = []
    for _ in range(5):
        _exchange(0)
        times.append(time.time())
    return times


class _Pool:
    """Lends new buffers."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def borrow(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=self._device)

    def give_back(self, buffer: Tensor) -> None:
        pass


def collectives(transport: str) -> tuple[str, dict[str, tuple[bool, float, int]]]:
    """The way of transport, and of each collective of the engine: whether it is right, its seconds, its bytes (0: few).

    Args:
        transport: as the configuration's ``communication_transport``.
    """
    device = discover().device
    comm = Comm(dist.group.WORLD if dist.get_world_size() > 1 else None, device, _TIMEOUT, transport)
    try:
        trials = _list(comm) if comm.data.size > 1 else ()
        return _way(comm.gathers), {name: _timed(comm, prepare, size) for name, prepare, size in trials}
    finally:
        comm.close()


def _way(transport: Transport) -> str:
    if isinstance(transport, PeerMemoryTransport):
        return "shared memory"
    if isinstance(transport, HostStagedTransport):
        return "gloo, through host memory"
    return "nccl" if isinstance(transport, NcclTransport) else "gloo"


Trial = tuple[Callable[[], object], Callable[[], bool]]
"""A collective to run, and whether all numbers are right after it."""


def _list(comm: Comm) -> Sequence[tuple[str, Callable[[], Trial], int]]:
    """Each collective of the engine: its name, what prepares a trial, and its bytes (0: few)."""
    size = comm.data.size
    equal = [rank * (_NUMEL // size) for rank in range(size + 1)]
    unequal = [rank * (rank + 1) // 2 * 1000 for rank in range(size + 1)]
    return [
        ("gather", partial(_gather, comm, equal), 4 * equal[-1]),
        ("gather of unequal shards", partial(_gather, comm, unequal), 0),
        ("reduction", partial(_reduce, comm, equal), 4 * equal[-1]),
        ("reduction of unequal shards", partial(_reduce, comm, unequal), 0),
        ("row of the step", partial(_row, comm), 0),
        ("row of integers", partial(_integers, comm), 0),
        ("message", partial(_message, comm), 0),
        ("broadcast", partial(_broadcast, comm), 0),
    ]


def _timed(comm: Comm, prepare: Callable[[], Trial], size: int) -> tuple[bool, float, int]:
    """Whether every trial was right, and the time of the fastest; the first one makes connections."""
    right, seconds = True, []
    for _ in range(_ROUNDS):
        run, is_right = prepare()
        comm.all_gather_ints([0])  # ranks begin together
        _synchronize(comm.device)
        begin = time.perf_counter()
        run()
        _synchronize(comm.device)
        seconds.append(time.perf_counter() - begin)
        right = is_right() and right
    return right, min(seconds), size


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _gather(comm: Comm, cuts: Sequence[int]) -> Trial:
    rank = comm.data.rank
    whole = torch.zeros(cuts[-1], device=comm.device)
    parts = [whole[start:stop] for start, stop in pairwise(cuts)]
    parts[rank].fill_(rank + 1)
    return (
        lambda: comm.gathers.gather(None, whole, cuts).wait(),
        lambda: all(bool((part == source + 1).all()) for source, part in enumerate(parts)),
    )


def _reduce(comm: Comm, cuts: Sequence[int]) -> Trial:
    rank, size = comm.data.rank, comm.data.size
    whole = torch.full((cuts[-1],), float(rank + 1), device=comm.device)
    out = torch.zeros(cuts[rank + 1] - cuts[rank], device=comm.device)
    return (
        lambda: comm.reductions.reduce(0, whole, cuts, out, add=False, scratch=_Pool(comm.device)).wait(),
        lambda: bool((out == size * (size + 1) / 2).all()),
    )


def _row(comm: Comm) -> Trial:
    rows: list[Tensor] = []
    row = torch.full((8,), float(comm.data.rank), device=comm.device)
    right = torch.arange(comm.data.size, device=comm.device).unsqueeze(1)
    return lambda: rows.append(comm.all_gather_vector(row)), lambda: bool((rows[0] == right).all())


def _integers(comm: Comm) -> Trial:
    rows: list[list[list[int]]] = []
    right = [[rank, 7] for rank in range(comm.data.size)]
    return lambda: rows.append(comm.all_gather_ints([comm.data.rank, 7])), lambda: rows == [right]


def _message(comm: Comm) -> Trial:
    said: list[Any] = []
    right = [{"rank": rank} for rank in range(comm.data.size)]
    return lambda: said.append(comm.messages.exchange({"rank": comm.data.rank})), lambda: said == [right]


def _broadcast(comm: Comm) -> Trial:
    source = comm.data.size - 1
    value = torch.full((1000,), float(comm.data.rank), device=comm.device)
    return lambda: comm.messages.broadcast([value], source), lambda: bool((value == source).all())


def train(stage: int) -> tuple[str, list[float]]:
    """The type of device, and the weights after three steps of a tiny model in fp32."""
    topology = discover()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    data = torch.randn(3, topology.world_size, 4, 6)[:, topology.rank].to(topology.device)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
    }
    engine, *_ = initialize(model=model, config=config)
    try:
        for batch in data:
            engine.backward(engine(batch).square().mean())
            engine.step()
        weights = torch.cat([weight.flatten() for weight in engine.full_state_dict().values()])
        return topology.device.type, weights.tolist()
    finally:
        engine.destroy()
