"""The ranks of a test as peers, without an engine or a Comm around them."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from shardline.comm import Group, TransitionLog
from shardline.comm.peer_memory import Peers, attach


def exchange(value):
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def peers_here(timeout: float = 60.0) -> Peers:
    group = Group.of(dist.group.WORLD)
    peers = attach(group, exchange, timedelta(seconds=timeout), TransitionLog(), wanted=True)
    assert peers is not None, "these ranks cannot read each other's memory"
    return peers


def leave(peers: Peers) -> None:
    """Close it when all ranks are done."""
    dist.barrier()
    peers.close()
