"""The only caller of collectives: transitions of flat buffers, the one small row a step, and values that ranks compare.

Gathers and reductions travel on process groups of their own, so that the order among gathers and the order among
reductions each need to be the same on all ranks, but not how the two mix. Everything sent is counted, and what was sent
in which order is digested, so that ranks that did not do the same notice at the step.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import zlib
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from datetime import timedelta
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from shardline.comm.direct import Peers, attach
from shardline.comm.transport import DONE, Scratch, Transport, Work, by_host, choose
from shardline.errors import DisagreementError, ShardlineError, UsageError
from shardline.runtime.device import Place, choose_backend

__all__ = ["DONE", "Comm", "Work", "check_alike"]

_OPERATIONS = ("gather", "reduce")

_LENGTH, _HEAD = 8, 512
"""Bytes of a length, and of the message that tells it: what is short travels along."""

_OPEN: WeakSet[Comm] = WeakSet()


@cache
def _let_go_at_exit() -> None:
    """Let the process groups end where ``init_distributed`` ends them: its hook is older, so it runs after this one.

    The last reference ends the threads of a group. An engine that nobody destroyed would hold it for longer.
    """

    def let_go() -> None:
        for comm in list(_OPEN):
            comm._let_go()

    atexit.register(let_go)


class Comm:
    """The ranks of one data-parallel group, and what they say to each other.

    Attributes:
        rank, world_size: of this process in the group.
        device: of the tensors that travel.
        notice: what makes them travel slower than they could; None where nothing does.
        counts: transitions by (operation, unit index), since the start.
        elements: elements of the whole buffers that travelled, by operation.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        timeout: timedelta | None = None,
        backend: str | None = None,
        transport: str = "auto",
    ) -> None:
        self.device = device
        self.notice: str | None = None
        self._closed = False
        self.counts: Counter[tuple[str, int]] = Counter()
        self.elements: Counter[str] = Counter()
        self._log: dict[str, array[int]] = {operation: array("l") for operation in _OPERATIONS}
        self._whole = group
        self._host_group: dist.ProcessGroup | None = None
        self._pair: tuple[dist.ProcessGroup | None, dist.ProcessGroup | None] = (None, None)
        _OPEN.add(self)
        _let_go_at_exit()
        self._peers: Peers | None = None
        if group is None or dist.get_world_size(group) == 1:
            self.rank, self.world_size = 0, 1
            self._groups: list[dist.ProcessGroup] = []
            self._transports: tuple[Transport, Transport] | None = None
            return
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        ranks = dist.get_process_group_ranks(group)
        # Ranks outside of a mesh do not come here, so only its own can join. Among all ranks the ordinary way is
        # the sounder one: names of groups made locally come back after a destroy, with addresses of the old ones.
        local = len(ranks) < dist.get_world_size()
        cpu = torch.device("cpu")
        limit = timeout or _timeout_of(group, device) or _timeout_of(group, cpu)
        inherited = dict(pair.split(":") for pair in dist.get_backend_config().split(","))

        def make_group(backend: str | None = backend) -> dist.ProcessGroup:
            made = dist.new_group(ranks, timeout=limit, backend=backend, use_local_synchronization=local)
            self._groups.append(made)
            return made  # type: ignore[no-any-return]

        # Of the same kind on every rank whatever it computes on, and the host's: ranks compare that before they use
        # what may not work between their devices.
        self._groups = []
        self._host_group = host = make_group("gloo" if "cpu" not in inherited else backend)
        if backend is None:
            backend = self._backend_between(inherited)
        self._transports, self._staged = None, False
        if device.type == "cpu":
            limit = limit or default_pg_timeout
            self._peers = attach(self.rank, self.world_size, self.exchange, limit, wanted=transport == "auto")
        if self._peers is not None:
            gathers, reductions = self._peers.transports
            self._transports = (gathers, reductions)
            return
        fits = device.type == "cpu" or (backend is None and "cpu" in inherited)
        self._pair = first, second = host if fits else make_group(backend), make_group(backend)
        self._transports = choose(first, device), choose(second, device)
        self._staged = by_host(first, device)
        if device.type != "cpu":
            # A communicator is made at its first use. In the middle of a backward that may wait for ranks which
            # wait, on the device, for this one.
            for made in self._pair:
                dist.all_reduce(torch.zeros(1, device="cpu" if self._staged else device), group=made)

    def _backend_between(self, inherited: Mapping[str, str]) -> str | None:
        """The backend of groups for this device's tensors; None: that of the default group."""
        try:
            places = [Place(*each) for each in self.exchange(astuple(Place.of(self.device)))]
            backend, self.notice = choose_backend(places, inherited)
        except DisagreementError:
            self.close()
            raise
        return backend

    def channel(self) -> Comm:
        """Another line between the same ranks, for values on the CPU: what another thread may use. Collective."""
        return Comm(self._whole, torch.device("cpu"), backend="gloo", transport="gloo")

    def close(self) -> None:
        """Give the process groups back. Collective calls after it raise."""
        if self._peers is not None:
            self._peers.close()
        for group in self._groups:
            dist.destroy_process_group(group)
        self._peers, self._closed = None, True
        self._let_go()

    def _let_go(self) -> None:
        self._closed = self._closed or bool(self._groups)  # alone, all works without a group
        self._groups, self._transports, self._whole, self._host_group = [], None, None, None
        self._pair = None, None

    def give_up(self, error: ShardlineError | None) -> None:
        """Let ranks that wait for this one raise ``error`` too; ``None`` takes it back.

        They hear of it where they read each other's memory; elsewhere they find this rank gone when it ends.
        """
        if self._peers is not None:
            self._peers.give_up(error)

    def settle(self, patience: float | None = None) -> None:
        """Return when no other rank reads what this one sent in transitions that it has waited for.

        What rests on this rank and was gathered from there is written only after that. ``patience``: seconds after
        which to return all the same.
        """
        if self._peers is not None:
            self._peers.settle(patience)

    # -- transitions ------------------------------------------------------------------------------------------------

    def gather(self, unit: int, buffer: Tensor, boundaries: Sequence[int], own: Tensor | None = None) -> Work:
        """Bring every rank's range of ``buffer`` (1-D) here; in a world of one it is there.

        ``own`` is this rank's range at rest, not to be written before :meth:`settle`; without it the range is in
        place, and whoever waited for the work may write all of ``buffer``.
        """
        if self._alone() or self._transports is None:
            return DONE
        self._note("gather", unit, buffer.numel())
        if own is None:
            own = buffer[boundaries[self.rank] : boundaries[self.rank + 1]]
        return self._transports[0].gather(own, buffer, boundaries)

    def reduce(
        self, unit: int, buffer: Tensor, boundaries: Sequence[int], out: Tensor, *, add: bool, scratch: Scratch
    ) -> Work:
        """Write (``add``: add) the sum over ranks of this rank's range of ``buffer`` (1-D) to ``out`` (1-D)."""
        if self._transports is None:
            raise AssertionError("a world of one has nothing to reduce: its buffers are aliases")
        self._note("reduce", unit, buffer.numel())
        return self._transports[1].reduce(buffer, boundaries, out, add=add, scratch=scratch)

    def _note(self, operation: str, unit: int, elements: int) -> None:
        self.counts[operation, unit] += 1
        self.elements[operation] += elements
        self._log[operation].append(unit)

    def take_log(self) -> dict[str, array[int]]:
        """The units of every operation since the last call, in the order in which they were issued."""
        log, self._log = self._log, {operation: array("l") for operation in _OPERATIONS}
        return log

    # -- one small collective a step --------------------------------------------------------------------------------

    def rows(self, row: Tensor) -> Tensor:
        """Every rank's ``row`` (1-D), stacked: (world_size, len). The same bits on every rank."""
        if self._alone():
            return row.unsqueeze(0)
        host = row.cpu() if self._staged else row.to(self.device)
        stacked = host.new_empty(self.world_size, row.numel())
        if self._peers is not None:
            places = range(0, stacked.numel() + 1, row.numel())
            self._peers.transports[1].gather(host, stacked.view(-1), places).wait()
            self.settle()  # all ranks are here, so nothing that came before is read any more
        else:
            dist.all_gather(list(stacked.unbind()), host, group=self._pair[1])
        return stacked.to(row.device)

    def ask(self, row: Sequence[int]) -> list[list[int]]:
        """Every rank's ``row`` of int64, in rank order. It waits for no device, and for what was gathered before."""
        if self._alone():
            return [list(row)]
        mine = torch.tensor(row, dtype=torch.int64, device="cpu")
        rows = torch.empty(self.world_size, len(row), dtype=torch.int64, device="cpu")
        if self._peers is not None:
            places = range(0, rows.numel() + 1, len(row))
            self._peers.transports[0].gather(mine, rows.view(-1), places).wait()
        else:
            dist.all_gather(list(rows.unbind()), mine, group=self._host_group)
        return rows.tolist()

    # -- set-up: not in any hot path --------------------------------------------------------------------------------

    def broadcast(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Copy ``source``'s values of ``tensors`` (dense, any dtype) to every rank, in place."""
        for work in [self.start_broadcast(tensor, source) for tensor in tensors]:
            work.wait()

    def start_broadcast(self, tensor: Tensor, source: int = 0) -> Work:
        """Start to copy ``source``'s values of ``tensor`` (dense, any dtype) to every rank, in place."""
        if self._alone() or not tensor.numel():
            return DONE
        stored = tensor.detach()
        if not _is_dense(stored):
            stored = stored.contiguous()
        wire = stored.as_strided((stored.numel(),), (1,), stored.storage_offset()).view(torch.uint8)
        on_wire = wire.cpu() if self._staged else wire.to(self.device)
        if self._peers is not None:  # a gather in which all of it is one rank's range
            places = [0] * (source + 1) + [wire.numel()] * (self.world_size - source)
            own = on_wire[places[self.rank] : places[self.rank + 1]]
            sent = self._peers.transports[0].gather(own, on_wire, places)
        else:
            handle = dist.broadcast(on_wire, group_src=source, group=self._pair[0], async_op=True)
            sent = Work([handle] if handle is not None else (), hold=on_wire)

        def arrive() -> None:
            sent.wait()
            if on_wire.data_ptr() != wire.data_ptr():
                wire.copy_(on_wire)
            if stored.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(stored)

        return Work((), arrive, arrived=sent.has_arrived)

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in rank order. It travels as JSON text: nothing that is received can run."""
        if self._alone():
            return [json.loads(json.dumps(value))]
        text = json.dumps(value).encode()
        heads = self._all_gather(len(text).to_bytes(_LENGTH, "little") + text[: _HEAD - _LENGTH], _HEAD)
        lengths = [int.from_bytes(head[:_LENGTH], "little") for head in heads]
        longest = max(lengths)
        texts = [head[_LENGTH:] for head in heads] if longest <= _HEAD - _LENGTH else self._all_gather(text, longest)
        return [json.loads(each[:length]) for each, length in zip(texts, lengths, strict=True)]

    def _all_gather(self, data: bytes, size: int) -> list[bytes]:
        """Every rank's ``data``, filled up to ``size`` bytes."""
        own = torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8)
        found = [torch.empty_like(own) for _ in range(self.world_size)]
        self._join(dist.all_gather(found, own, group=self._host_group, async_op=True))
        return [each.numpy().tobytes() for each in found]

    def _join(self, handle: dist.Work | None) -> None:
        """Wait for a collective of c10d without keeping others from transitions that were started before."""
        if handle is not None:
            if self._peers is not None:
                self._peers.finish_started(handle.is_completed)
            handle.wait()

    def all_alike(self, value: Any) -> bool:
        """Whether every rank has the same ``value``."""
        everyone = self.exchange(value)
        return all(other == everyone[0] for other in everyone)

    def agree(self, what: dict[str, Any]) -> None:
        """Compare ``what`` over the ranks, key by key.

        Raises:
            DisagreementError: naming the first key that differs, the ranks and both values.
        """
        if not self.all_alike(hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()):
            check_alike(self.exchange(what))

    def _alone(self) -> bool:
        """Whether there is nobody to talk to."""
        if self._closed:
            raise UsageError("the engine was destroyed: its process groups are gone. Make a new one with initialize.")
        return not self._groups


def check_alike(everyone: Sequence[dict[str, Any]]) -> None:
    """See that every rank has the same values (JSON; one dict for each rank).

    Raises:
        DisagreementError: naming the first key that differs, the ranks and both values.
    """
    for key in dict.fromkeys(key for each in everyone for key in each):
        value = everyone[0].get(key)
        for rank, other in enumerate(everyone):
            if other.get(key) != value:
                raise DisagreementError(
                    f"ranks disagree on {key}: rank 0 has {_shorten(value)}, rank {rank} has "
                    f"{_shorten(other.get(key))}. Every rank must run the same script with the same configuration, "
                    f"model, data and versions."
                )


def _timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta | None:
    """How long its collectives on ``device`` wait for a rank; None if it has none there."""
    try:
        return group._get_backend(device).options._timeout
    except (RuntimeError, AttributeError):
        return None


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their range of storage, in whatever order of dimensions."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def digest(*sequences: Sequence[int] | array[int]) -> int:
    """A 32-bit digest of sequences of integers; exact in a float64."""
    found = 0
    for sequence in sequences:
        found = zlib.crc32(array("l", [len(sequence), *sequence]).tobytes(), found)
    return found


def _shorten(value: Any, limit: int = 300) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else text[:limit] + " ..."
