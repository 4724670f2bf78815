"""Sockets: a store that listens on one address alone, and which interface an address belongs to."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
import sys
import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from shardline.errors import LaunchError
from shardline.runtime.patience import Patience

__all__ = [
    "LOOPBACK",
    "PrefixStore",
    "Store",
    "TCPStore",
    "addresses",
    "interface",
    "is_loopback",
    "is_loopback_by_name",
    "join_store",
    "open_store",
    "own_address",
]

LOOPBACK = "127.0.0.1"

_HANDSHAKE_SECONDS = 15.0

_ADVICE = {
    errno.EADDRINUSE: "Another program has this port; choose another one.",
    errno.EADDRNOTAVAIL: "It must be an address of the machine that rank 0 runs on.",
    errno.EACCES: "Choose a port of at least 1024.",
}


def open_store(host: str, port: int, timeout: timedelta) -> TCPStore:
    """Open a store whose server, in this process, listens on the address of ``host`` alone (torch's own: on all).

    Args:
        host: a name or an address of this machine.
        port: 0 for a free one. The store's ``port`` is the true one, and its ``host`` is always an address.
        timeout: how long a call may wait for a key.

    Raises:
        LaunchError: this machine has no such address, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address, family=family)
    except socket.gaierror as error:
        raise LaunchError(f"Cannot listen on {host}: {error.strerror}. {_ADVICE[errno.EADDRNOTAVAIL]}") from None
    except OSError as error:
        number = error.errno or 0
        advice = _ADVICE.get(number, "")
        raise LaunchError(f"Cannot listen on {host}, port {port}: {os.strerror(number)}. {advice}".rstrip()) from None
    number = listener.getsockname()[1]
    return TCPStore(
        str(address[0]),
        number,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),  # the store closes it
    )


def join_store(
    host: str, port: int, timeout: timedelta, patience: Patience | None = None, whose: str = "store of rank 0"
) -> TCPStore:
    """Join the store that another process opened at this address, once it is there.

    Args:
        timeout: how long a call may wait for a key.
        patience: with which the store is waited for; None: silently, for ``timeout``.
        whose: it is, in sentences.

    Raises:
        LaunchError: nothing answered in time, or what answered is not a store.
    """
    patience = patience or Patience(timeout.total_seconds(), "timeout", "")
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            break
        except OSError as error:
            patience.wait(f"no {whose} answers at {place} ({error.strerror or error})")
    joined: list[TCPStore] = []

    def join() -> None:
        with suppress(RuntimeError):
            limit = timedelta(seconds=_HANDSHAKE_SECONDS)
            joined.append(TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False))

    # torch waits for the other end's first word without a limit
    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(_HANDSHAKE_SECONDS)
    if not joined:
        raise LaunchError(f"What answers at {place} is not the {whose}.")
    joined[0].set_timeout(timeout)
    return joined[0]


def addresses(host: str) -> list[str]:
    """The addresses of a host; empty where it is unknown."""
    try:
        return [str(address[0]) for *_, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except OSError:
        return []


def own_address(host: str, port: int) -> str:
    """The address from which this machine connects to the host. Nothing is sent.

    Raises:
        OSError: the host is unknown, or no interface leads to it.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def interface(address: str) -> str | None:
    """Name of this machine's network interface that has the address; None where that cannot be found out."""
    if is_loopback(address):
        return "lo0" if sys.platform == "darwin" else "lo"
    if sys.platform != "linux":
        return None
    import fcntl

    wanted = ipaddress.ip_address(address.partition("%")[0])
    if wanted.version == 6:
        table = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
        return next((name for digits, *_, name in table if digits == wanted.packed.hex()), None)
    SIOCGIFADDR = 0x8915
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            if fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24] == wanted.packed:
                return name
    return None


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach the address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def is_loopback_by_name(host: str) -> bool:
    """Whether the host's name stands for loopback here, as a machine's own name often does, but elsewhere may not."""
    found = addresses(host)
    return host != "localhost" and host not in found and bool(found) and all(map(is_loopback, found))
