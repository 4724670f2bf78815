"""Ranks of a launcher that was killed end by themselves."""

from __future__ import annotations

import os
import select
from contextlib import suppress
from functools import cache
from threading import Thread

from shardline.runtime.environment import has_agent_store, read_launcher

__all__ = ["end_with_the_launcher"]


@cache
def end_with_the_launcher() -> None:
    """From now on this process ends when torchrun, which started it, has ended in whatever way (Linux).

    The main thread may wait for other ranks, or hang, so another one ends the process. Under ``shardline run`` the
    kernel does it.
    """
    if not has_agent_store():
        return
    launcher = os.getppid()
    with suppress(OSError, AttributeError):  # another system
        process = os.pidfd_open(launcher)
        arguments = (process, launcher, read_launcher().rank)
        Thread(target=_end_after, args=arguments, name="shardline-launcher", daemon=True).start()


def _end_after(process: int, launcher: int, rank: int) -> None:
    if os.getppid() == launcher:  # else it ended before it was opened
        poll = select.poll()
        poll.register(process, select.POLLIN)
        poll.poll()
    with suppress(OSError):  # a terminal that is gone
        os.write(2, f"shardline: the launcher (process {launcher}) has ended, so rank {rank} ends too.\n".encode())
    os._exit(1)
