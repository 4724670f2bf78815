"""Set-up messages: values that ranks compare, and tensors that one rank sends to all. Not for the hot path."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardline.comm.groups import Group, ProcessGroups, release_at_exit
from shardline.comm.transport import CLOSED, SINGLE_PROCESS, Transport, Work, choose, closed_error
from shardline.errors import DisagreementError
from shardline.watch import Channel, Operation

__all__ = ["Exchange", "all_gather_json", "check_alike"]

_LENGTH, _HEAD = 8, 512
"""Bytes of a length, and of the first message, which has the length and a short text itself."""


class Exchange:
    """Messages between the ranks of one group: JSON values, and dense tensors of one rank.

    Args:
        group: the ranks.
        host: their process group for tensors on the CPU; None in a single process.
        device: of tensors that are sent.
        transport: by which they are sent.
        channel: of ``host``; None for a thread other than the main one, which is not watched.
        before: called before a wait for a collective on ``host``, with a function that returns whether it is over.
    """

    def __init__(
        self,
        group: Group,
        host: dist.ProcessGroup | None,
        device: torch.device,
        transport: Transport = SINGLE_PROCESS,
        channel: Channel | None = None,
        before: Callable[[Callable[[], bool]], object] | None = None,
    ) -> None:
        self.rank, self.world_size = group.rank, group.size
        self.device = device
        self._host, self._transport, self._channel, self._before = host, transport, channel, before
        self._own: ProcessGroups | None = None
        self._closed = False

    @classmethod
    def over(cls, parent: dist.ProcessGroup | None) -> Exchange:
        """Messages on a process group of their own (gloo), for tensors on the CPU: for another thread. Collective."""
        group, cpu = Group.of(parent), torch.device("cpu")
        if parent is None or group.size == 1:
            return cls(group, None, cpu)
        groups = ProcessGroups(parent, cpu)
        host = groups.make("gloo")
        made = cls(group, host, cpu, choose(host, cpu))
        made._own = groups
        release_at_exit(made)
        return made

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in rank order. It is sent as JSON text: nothing that is received can run.

        Raises:
            UsageError: after :meth:`close`.
        """
        if self._closed:
            raise closed_error()
        if self._host is None:
            return [json.loads(json.dumps(value))]
        if self._channel is None:
            return all_gather_json(value, self._host)
        return all_gather_json(value, self._host, partial(self._finish, self._channel))

    def _finish(self, channel: Channel, start: Callable[[], dist.Work]) -> None:
        ticket = channel.start(Operation.MESSAGE)
        handle = start()
        if self._before is not None:
            self._before(handle.is_completed)
        channel.finish(handle, ticket)

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

    def broadcast(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Copy ``source``'s values of ``tensors`` (dense, any dtype) to every rank, in place."""
        for work in [self.start_broadcast(tensor, source) for tensor in tensors]:
            work.wait()

    def start_broadcast(self, tensor: Tensor, source: int = 0) -> Work:
        """Start to copy ``source``'s values of ``tensor`` (dense, any dtype, any device) to every rank, in place."""
        if self._closed:
            raise closed_error()
        if self._host is None or not tensor.numel():
            return Work(())
        stored = tensor.detach()
        if not _is_dense(stored):
            stored = stored.contiguous()
        flat = stored.as_strided((stored.numel(),), (1,), stored.storage_offset())
        # A gather of a buffer that is one rank's range.
        work = self._start(flat, [0] * (source + 1) + [flat.numel()] * (self.world_size - source))
        if stored.data_ptr() != tensor.data_ptr():
            work = work.then(lambda: tensor.detach().copy_(stored))
        return work

    def gather(self, buffer: Tensor, cuts: Sequence[int]) -> None:
        """Fill ``buffer`` (1-D, any dtype, any device) with every rank's range; this rank's is there.

        Args:
            cuts: of the ranges, one more than ranks.
        """
        if self._closed:
            raise closed_error()
        if self._host is not None and buffer.numel():
            self._start(buffer.detach(), cuts).wait()

    def _start(self, flat: Tensor, cuts: Sequence[int]) -> Work:
        stored, size = flat.view(torch.uint8), flat.element_size()
        sent = stored.to(self.device)
        work = self._transport.gather(None, sent, [size * each for each in cuts], operation=Operation.BROADCAST)
        return work if sent.data_ptr() == stored.data_ptr() else work.then(lambda: stored.copy_(sent))

    def close(self) -> None:
        """Destroy the process group that :meth:`over` made. Messages after it raise."""
        if self._own is not None:
            self._own.destroy()
        self.release()
        self._closed = True

    def release(self) -> None:
        """Drop the references to process groups."""
        self._closed = self._closed or self._host is not None
        self._host, self._own, self._transport, self._channel, self._before = None, None, CLOSED, None, None


def _run(start: Callable[[], dist.Work]) -> None:
    start().wait()


def all_gather_json(
    value: Any, group: dist.ProcessGroup, run: Callable[[Callable[[], dist.Work]], object] = _run
) -> list[Any]:
    """Every rank's ``value`` as JSON makes it, in rank order. Collective; ``run`` starts one and waits for it."""

    def all_gather(data: bytes, size: int) -> list[bytes]:
        own = torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8)
        memory = [bytearray(size) for _ in range(dist.get_world_size(group))]
        found = [torch.frombuffer(each, dtype=torch.uint8) for each in memory]
        run(lambda: dist.all_gather(found, own, group=group, async_op=True))
        return [bytes(each) for each in memory]

    text = json.dumps(value).encode()
    heads = all_gather(len(text).to_bytes(_LENGTH, "little") + text[: _HEAD - _LENGTH], _HEAD)
    lengths = [int.from_bytes(head[:_LENGTH], "little") for head in heads]
    longest = max(lengths)
    texts = [head[_LENGTH:] for head in heads] if longest <= _HEAD - _LENGTH else all_gather(text, longest)
    return [json.loads(each[:length]) for each, length in zip(texts, lengths, strict=True)]


def check_alike(everyone: Sequence[dict[str, Any]]) -> None:
    """Check that every rank has the same values (JSON; one dict for each rank).

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


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their range of storage, in whatever order of dimensions."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _shorten(value: Any, limit: int = 300) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else text[:limit] + " ..."
