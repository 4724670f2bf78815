"""How the launchers of a job find each other, and the store at which its ranks meet.

torch's own rendezvous listens on all interfaces and unpickles what it finds in its store, so a program that reaches
the port runs code as the user. Here the launcher binds the socket itself, to the interface of the rendezvous alone,
and gives it to the store; ranks join that store and open none. Each attempt has a new one, without the keys of the
last. Messages between launchers are text. Only the state of torch's dynamic rendezvous, for a number of nodes that
may change, is pickled: it carries a keyed hash, which is checked first.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousBackend,
    RendezvousTimeout,
)

from shardline.errors import LaunchError
from shardline.launch.background import background
from shardline.runtime.environment import listen_on
from shardline.runtime.network import (
    LOOPBACK,
    PrefixStore,
    Store,
    TCPStore,
    addresses,
    is_loopback_by_name,
    join_store,
    open_store,
    own_address,
)
from shardline.runtime.patience import Patience

__all__ = ["BACKEND", "Meeting", "NotNeeded", "register"]

BACKEND = "shardline"
_STORE_TIMEOUT = timedelta(seconds=60)  # for an answer of a store that is there
_LAST_CALL = timedelta(seconds=30)  # how long enough nodes wait for more, each of which would later be a restart
_HEARTBEAT_SECONDS = 5  # a node that was silent for three of them is taken for lost


@dataclass(frozen=True)
class Meeting:
    """The address at which launchers meet, and how many there are."""

    host: str
    """What node 0 listens on; of a single node, where its ranks meet."""
    port: int
    """0, on a single node: a free one."""
    nodes: tuple[int, int] = (1, 1)
    """The least and the most."""
    rank: int = 0
    """Number of this node; means nothing where the number of nodes may change."""
    seconds: float = 900.0
    """How long to wait for the others."""
    secret: bytes = field(default=b"", repr=False)
    """Key of the hash, where the number of nodes may change."""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class NotNeeded(Exception):
    """The job had enough nodes without this one, and has ended."""


def register() -> None:
    """Make ``BACKEND`` known to torch elastic; its one parameter is ``meeting``."""
    rendezvous_handler_registry.register(BACKEND, _handler)


def _handler(parameters: RendezvousParameters) -> RendezvousHandler:
    meeting: Meeting = parameters.config["meeting"]
    if meeting.nodes[1] > 1 and is_loopback_by_name(meeting.host) and _is_here(meeting):
        raise LaunchError(
            f"{meeting.host} is this machine's name for itself alone: here it stands for {addresses(meeting.host)[0]}, "
            f"which no other machine can reach. Give --master the address that this machine has in the network."
        )
    return FixedNodes(meeting) if meeting.nodes[0] == meeting.nodes[1] else ChangingNodes.at(meeting)


class FixedNodes(RendezvousHandler):
    """A given number of nodes, each with its number. They wait for each other, then node 0 opens the ranks' store."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting
        self._count = meeting.nodes[0]
        self._attempt = 0
        self._store: Store | None = None
        self._ranks_store: TCPStore | None = None

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        meeting, patience = self._meeting, _patience(self._meeting)
        self._attempt += 1
        self._ranks_store = None  # closes it: its port may be needed again
        if self._count == 1:
            listen_on(LOOPBACK)
            self._store = self._store or dist.HashStore()  # type: ignore[attr-defined]
            store = PrefixStore(f"attempt {self._attempt}", self._store)
            self._ranks_store = open_store(meeting.host, meeting.port, _STORE_TIMEOUT)
            return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(self._ranks_store.host, self._ranks_store.port))
        with _in_words(meeting):
            if self._store is None:
                self._store = _host(meeting) if meeting.rank == 0 else _join(meeting, patience)
            store = PrefixStore(f"attempt {self._attempt}", self._store)
            self._wait_for_all(store, patience)
            self._ranks_store, info = _meet_ranks(store, meeting, meeting.rank)
        return RendezvousInfo(store, meeting.rank, self._count, info)

    def _wait_for_all(self, store: Store, patience: Patience) -> None:
        meeting, count = self._meeting, str(self._count)
        if meeting.rank == 0:
            store.set("nodes", count)
        while not store.check(["nodes"]):
            patience.wait(f"the launcher of node 0 did not begin at {meeting}")
        if (said := store.get("nodes").decode()) != count:
            raise LaunchError(f"--nnodes is {count} here and {said!r} on node 0; give all nodes the same.")
        if store.add(f"node {meeting.rank}", 1) > 1:
            raise LaunchError(f"Two launchers at {meeting} have --node-rank {meeting.rank}: every node has its own.")
        while absent := [str(rank) for rank in range(self._count) if not store.check([f"node {rank}"])]:
            here = self._count - len(absent)
            patience.wait(
                f"{here} of {count} nodes {'is' if here == 1 else 'are'} at {meeting}: node{'s' * (len(absent) > 1)} "
                f"{', '.join(absent)} did not come"
            )

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return BACKEND

    def shutdown(self) -> bool:
        return True


class ChangingNodes(DynamicRendezvousHandler):
    """As many nodes as come, between two limits: torch's dynamic rendezvous over a state that is signed."""

    _meeting: Meeting
    _ranks_store: TCPStore | None = None

    @classmethod
    def at(cls, meeting: Meeting) -> ChangingNodes:
        """Host the store where its address is this machine's, unless another launcher here does; else join it."""
        # torch would open a store for the ranks, on all interfaces
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with _in_words(meeting):
            store = None
            if _is_here(meeting):
                with suppress(LaunchError):  # another launcher of this machine has the port
                    store = _host(meeting)
            store = store or _join(meeting, _patience(meeting))
            handler = cls.from_backend(
                BACKEND,
                store,
                SignedBackend(C10dRendezvousBackend(store, BACKEND), meeting.secret),
                *meeting.nodes,
                local_addr=own_address(meeting.host, meeting.port),
                timeout=RendezvousTimeout(join=timedelta(seconds=meeting.seconds), last_call=_LAST_CALL),
                keep_alive_interval=_HEARTBEAT_SECONDS,
            )
        if not isinstance(handler, cls):
            raise AssertionError(f"torch made a {type(handler).__name__} of {cls.__name__}")
        handler._meeting = meeting
        return handler

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        meeting = self._meeting
        self._ranks_store = None
        with _in_words(meeting), _saying(meeting):
            info = super().next_rendezvous()
            self._ranks_store, where = _meet_ranks(PrefixStore("ranks", info.store), meeting, info.rank)
        return RendezvousInfo(info.store, info.rank, info.world_size, where)

    def num_nodes_waiting(self) -> int:
        with _in_words(self._meeting):
            return super().num_nodes_waiting()


class SignedBackend(RendezvousBackend):
    """A backend whose state begins with a keyed hash of the rest, which is checked before it is unpickled."""

    def __init__(self, backend: RendezvousBackend, secret: bytes) -> None:
        self._backend = backend
        self._secret = secret

    @property
    def name(self) -> str:
        return BACKEND

    def get_state(self) -> tuple[bytes, Any] | None:
        found = self._backend.get_state()
        return found and (self._checked(found[0]), found[1])

    def set_state(self, state: bytes, token: Any | None = None) -> tuple[bytes, Any, bool] | None:
        found = self._backend.set_state(self._digest(state) + state, token)
        return found and (self._checked(found[0]), *found[1:])

    def _digest(self, state: bytes) -> bytes:
        return hmac.digest(self._secret, b"shardline rendezvous" + state, "sha256")

    def _checked(self, signed: bytes) -> bytes:
        size = hashlib.sha256().digest_size
        digest, state = signed[:size], signed[size:]
        if not hmac.compare_digest(digest, self._digest(state)):
            raise RendezvousStateError("it was not written with this launcher's secret, so it was not read")
        return state


def _is_here(meeting: Meeting) -> bool:
    with suppress(OSError):
        return own_address(meeting.host, meeting.port) in addresses(meeting.host)
    return False


def _host(meeting: Meeting) -> TCPStore:
    return open_store(meeting.host, meeting.port, _STORE_TIMEOUT)


def _patience(meeting: Meeting, sleep: Callable[[float], object] = time.sleep) -> Patience:
    return Patience(meeting.seconds, "--join-timeout", "shardline run", sleep)


def _join(meeting: Meeting, patience: Patience) -> TCPStore:
    return join_store(meeting.host, meeting.port, _STORE_TIMEOUT, patience, "launcher of node 0")


def _meet_ranks(store: Store, meeting: Meeting, rank: int) -> tuple[TCPStore | None, RendezvousStoreInfo]:
    """Open the store of the ranks on node 0, and tell the other nodes where."""
    own = own_address(meeting.host, meeting.port)
    listen_on(own)
    opened = None
    if rank == 0:
        opened = open_store(own, 0, _STORE_TIMEOUT)
        store.set("store of the ranks", f"{opened.port} {opened.host}")
    port, host = store.get("store of the ranks").decode().split()
    return opened, RendezvousStoreInfo(host, int(port))


def _saying(meeting: Meeting) -> AbstractContextManager[None]:
    """Within it nodes are waited for, by torch, which does not say so."""

    def wait(over: threading.Event) -> None:
        patience = _patience(meeting, over.wait)
        with suppress(LaunchError):  # torch has the same limit
            while not over.is_set():
                patience.wait(f"fewer than {meeting.nodes[0]} nodes joined {meeting}")

    return background(wait)


@contextmanager
def _in_words(meeting: Meeting) -> Iterator[None]:
    """Turn errors between launchers into sentences."""
    try:
        yield
    except RendezvousGracefulExitError as error:
        raise NotNeeded from error
    except RendezvousClosedError as error:
        raise LaunchError(f"The job at {meeting} has ended on the other nodes.") from error
    except RendezvousTimeoutError as error:
        raise LaunchError(
            f"Fewer than {meeting.nodes[0]} nodes joined {meeting} in {meeting.seconds:g} s (--join-timeout)."
        ) from error
    except RendezvousStateError as error:
        raise LaunchError(
            f"The state of the rendezvous at {meeting} is not this job's: {error}. Either the nodes have different "
            f"secrets, or another program writes there."
        ) from error
    except (RendezvousError, dist.DistError) as error:
        raise LaunchError(f"The launcher that answered at {meeting} has ended, or can no longer be reached.") from error
    except (OSError, ValueError) as error:
        raise LaunchError(f"The launchers at {meeting} could not communicate: {error}.") from error
