"""Which sockets a process listens with, from the kernel's own tables."""

from __future__ import annotations

import gc
import ipaddress
import os
import random
import socket
from contextlib import suppress
from pathlib import Path

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def free_port() -> int:
    """A port of the loopback interface that is free, and stays it until the caller's own process takes it.

    It is below those that the system itself chooses from: one of these may go to any other process in between.
    """
    draw = random.SystemRandom()  # two sessions of tests on one machine do not draw alike
    while True:
        port = draw.randrange(16_000, 32_000)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def listening(*pids: int) -> list[tuple[Address, int]]:
    """Address and port of every TCP socket that the processes (without any: this one) listen with."""
    found = []
    gc.collect()  # stores of tests that ended by an error
    for pid in pids or (os.getpid(),):
        own = set()
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                own.add(os.readlink(link))
            except FileNotFoundError:
                continue
        for table in ("tcp", "tcp6"):
            file = Path(f"/proc/{pid}/net/{table}")
            for line in file.read_text().splitlines()[1:] if file.exists() else []:
                _, local, _, state, *_, inode = line.split()[:10]
                if state == "0A" and f"socket:[{inode}]" in own:
                    digits, port = local.split(":")
                    words = [bytes.fromhex(digits[at : at + 8])[::-1] for at in range(0, len(digits), 8)]
                    found.append((ipaddress.ip_address(b"".join(words)), int(port, 16)))
    return found


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that they did."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            found += [child, *descendants(child)]
    return found
