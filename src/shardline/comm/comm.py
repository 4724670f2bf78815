"""The ranks of one engine: transitions of flat buffers, one small vector a step, and the messages at set-up.

Gathers and reductions have process groups of their own (or shared memory), so that the order among gathers and
the order among reductions each must be the same on all ranks, but not how the two mix. The vector of a step goes with
the reductions; messages of the host go with the gathers where one group can send both. What is started is counted and
logged, so that a step notices ranks that did not start the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import astuple, replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from shardline.comm.exchange import Exchange, all_gather_json
from shardline.comm.groups import Group, ProcessGroups, release_at_exit
from shardline.comm.log import TransitionLog
from shardline.comm.peer_memory import Peers, attach
from shardline.comm.transport import CLOSED, SINGLE_PROCESS, Transport, choose, closed_error, is_staged
from shardline.errors import DisagreementError, ShardlineError
from shardline.runtime.device import RankDevice, choose_backend
from shardline.runtime.process_group import meet, rendezvous_store
from shardline.watch import CHANNELS, Channel, Operation, Ticket, Watch, Watchdog, WatchSettings

__all__ = ["Comm"]


class Comm:
    """What the ranks of one engine start together while they train.

    Attributes:
        shard: the ranks that share one copy of the states: whose rank is the index of a shard.
        data: the ranks that train on different samples. The same ranks as ``shard`` now.
        device: of the buffers.
        gathers, reductions: the transports of the two kinds of transitions.
        messages: between ranks, at set-up.
        log: of the transitions.
        watch: what each rank does, where the others can see it.
        notice: what makes communication slower than it could be; None where nothing does.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        timeout: timedelta | None = None,
        transport: str = "auto",
        watch: WatchSettings | None = None,
    ) -> None:
        self.shard = self.data = Group.of(group)
        self.device = device
        self.log = TransitionLog()
        self.notice: str | None = None
        self._parent = group
        self._groups: ProcessGroups | None = None
        self._peers: Peers | None = None
        self._host: dist.ProcessGroup | None = None
        self._vector_group: dist.ProcessGroup | None = None
        self._staged = self._closed = False
        self._asking: Channel | None = None  # on the process group of integers, and on that of rows
        self._comparing: Channel | None = None
        self._compared: Ticket | None = None  # the last comparison that runs on the device
        self._watchdog: Watchdog | None = None
        self.watch = Watch(self.data.rank, watch or WatchSettings())
        self.gathers: Transport = SINGLE_PROCESS
        self.reductions: Transport = SINGLE_PROCESS
        if group is None or self.data.size == 1:
            self.messages = Exchange(self.data, None, device)
            return
        meet(dist.get_process_group_ranks(group), timeout)
        self._groups = ProcessGroups(group, device, timeout)
        self._connect(self._groups, transport, self.watch.settings)
        release_at_exit(self)

    def _connect(self, groups: ProcessGroups, transport: str, settings: WatchSettings) -> None:
        """Make the process groups, and choose the transports. Collective."""
        inherited = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
        on_cpu = self.device.type == "cpu"
        # On the CPU on every rank, whatever it computes on: ranks compare their devices before they use a backend that
        # may not work between these.
        self._host = host = groups.make(None if "cpu" in inherited else "gloo")
        backend = self._backend_between(groups, host, inherited)
        limit = groups.timeout or default_pg_timeout
        exchange = partial(all_gather_json, group=host)
        settings = replace(settings, timeout=limit.total_seconds())
        self.watch = Watch.join(self.data.rank, settings, exchange, rendezvous_store)
        self._watchdog = Watchdog(self.watch, self)
        gathers, reductions, messages = map(self.watch.channel, range(CHANNELS))
        if on_cpu:
            wanted = transport == "auto"
            self._peers = peers = attach(self.data, exchange, limit, self.log, wanted=wanted, watch=self.watch)
            if peers is not None:
                self.gathers, self.reductions = peers.transports
                self.messages = Exchange(self.data, host, self.device, self.gathers, messages, peers.finish_started)
                return
        first = host if on_cpu or (backend is None and "cpu" in inherited) else groups.make(backend)
        self._vector_group = second = groups.make(backend)
        if first is host:
            messages = gathers
        self._asking, self._comparing = messages, reductions
        self.gathers = choose(first, self.device, self.log, gathers)
        self.reductions = choose(second, self.device, self.log, reductions)
        self._staged = is_staged(first, self.device)
        self.messages = Exchange(self.data, host, self.device, self.gathers, messages)
        if not on_cpu:
            # A communicator is made at its first use. In the middle of a backward that may wait for ranks which wait,
            # on the device, for this one.
            for group in (first, second):
                dist.all_reduce(torch.zeros(1, device="cpu" if self._staged else self.device), group=group)

    def _backend_between(
        self, groups: ProcessGroups, host: dist.ProcessGroup, inherited: Mapping[str, str]
    ) -> str | None:
        """The backend of groups for this device's tensors; None: that of the default group."""
        try:
            places = [RankDevice(*each) for each in all_gather_json(astuple(RankDevice.of(self.device)), host)]
            backend, self.notice = choose_backend(places, inherited)
        except DisagreementError:
            groups.destroy()
            raise
        return backend

    def channel(self) -> Exchange:
        """Messages between the same ranks on a process group of their own, for another thread. Collective."""
        return Exchange.over(self._parent)

    def close(self) -> None:
        """Destroy the process groups. Collective calls after it raise."""
        if self._watchdog is not None:
            self._watchdog.stop()
        if self._peers is not None:
            self._peers.close()
        if self._groups is not None:
            self._groups.destroy()
        self.release()
        self.messages.close()
        self.watch.close()
        self._peers, self._closed = None, True
        self.gathers = self.reductions = CLOSED

    def release(self) -> None:
        """Drop the references to process groups. A single process has none, and can go on."""
        if self._groups is not None:
            self._closed, self.gathers, self.reductions = True, CLOSED, CLOSED
            self.messages.release()
        # Not the peers: the process waits for them at its end.
        self._parent = self._groups = self._host = self._vector_group = None

    def give_up(self, error: ShardlineError | None) -> None:
        """Let ranks that wait for this one raise ``error`` too; ``None`` takes it back.

        Ranks of other hosts notice when this process ends.
        """
        (self._peers or self.watch).give_up(error)

    # -- before resting weights are written -------------------------------------------------------------------------

    def wait_for_readers(self, patience: float | None = None) -> None:
        """Return when no other rank reads what this rank sent in transitions that it has waited for.

        Call it before a buffer at rest from which others gathered is written. ``patience``: seconds after which to
        return in any case.
        """
        if self._peers is not None:
            self._peers.wait_for_readers(patience)

    def check_unread(self, buffers: Iterable[Tensor]) -> None:
        """Check, without waiting, that no other rank reads ``buffers`` (dense), which are about to be written.

        Raises:
            AssertionError: one does: :meth:`wait_for_readers` is missing before the write.
        """
        if self._peers is not None:
            self._peers.check_unread(buffers)

    # -- small collectives in a step --------------------------------------------------------------------------------

    def all_gather_vector(self, vector: Tensor) -> Tensor:
        """Every rank's ``vector`` (1-D), stacked: (ranks, len). The same bits on every rank. It waits for readers, too.

        Raises:
            UsageError: the engine was destroyed.
        """
        if self._closed:
            raise closed_error()
        if self.data.size == 1:
            return vector.unsqueeze(0)
        local = vector.cpu() if self._staged else vector.to(self.device)
        stacked = local.new_empty(self.data.size, vector.numel())
        if self._peers is not None:
            cuts = range(0, stacked.numel() + 1, vector.numel())
            self.reductions.gather(None, stacked.view(-1), cuts, local, Operation.COMPARE).wait()
            self._peers.wait_for_readers()  # all ranks are here, so what they gathered before is read by now
        else:
            self._all_gather(stacked, local, self._vector_group, self._comparing, Operation.COMPARE)
        return stacked.to(vector.device)

    def all_gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's ``values`` (of int64, as many on every rank), in rank order.

        It waits for no device; it may wait for gathers that were started before. Raises as :meth:`all_gather_vector`.
        """
        if self._closed:
            raise closed_error()
        if self.data.size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.int64, device="cpu")
        stacked = torch.empty(self.data.size, len(values), dtype=torch.int64, device="cpu")
        if self._peers is not None:
            cuts = range(0, stacked.numel() + 1, len(values))
            self.gathers.gather(None, stacked.view(-1), cuts, mine, Operation.NEGOTIATE).wait()
        else:
            self._all_gather(stacked, mine, self._host, self._asking, Operation.NEGOTIATE)
        return stacked.tolist()

    def _all_gather(
        self, stacked: Tensor, mine: Tensor, group: dist.ProcessGroup | None, channel: Channel | None, what: Operation
    ) -> None:
        """Fill ``stacked`` with every rank's ``mine``, over c10d."""
        if channel is None:
            raise AssertionError("ranks without a process group cannot exchange anything")
        ticket = channel.start(what)
        handle = dist.all_gather(list(stacked.unbind()), mine, group=group, async_op=True)
        with self.log.waiting(mine.device):
            if mine.device.type == "cpu":
                channel.finish(handle, ticket)
            else:
                self._compared = ticket
                handle.wait()

    def waiting_for_device(self) -> AbstractContextManager[None]:
        """Within it the host waits for the device, on which the ranks compare their vectors.

        Raises:
            ShardlineError: as waits on the host do. The communicators are aborted then, without which that never ends.
        """
        if self._comparing is None or self._compared is None:
            return nullcontext()
        return self.watch.waiting_for_device(self._comparing, self._compared, self._abort)

    def _abort(self) -> None:
        """End what runs on the device between ranks, without waiting for it.

        All at once: the end of a communicator frees memory of the device, which waits until the others have ended.
        """
        for group in self._groups.made if self._groups is not None else ():
            if group is not self._host:
                threading.Thread(target=_abort, args=(group,), name="shardline-abort", daemon=True).start()


def _abort(group: dist.ProcessGroup) -> None:
    with suppress(RuntimeError):  # a backend that cannot
        group.abort()
