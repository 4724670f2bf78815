"""Whether hosts, ranks and what is between them are fit to train: checks, each with a verdict."""

from __future__ import annotations

from shardline.doctor.host import devices, peer_to_peer, ports, shared_memory, versions
from shardline.doctor.ranks import clocks, collectives, readable, train
from shardline.doctor.verdict import Check, Verdict, judge_clocks, judge_speed, judge_training, worst

__all__ = ["Check", "Verdict", "checks"]


def checks() -> list[Check]:
    """All checks, in the order in which they run."""
    hosts = [
        Check("versions", versions, worst, alone=True),
        Check("shared memory", shared_memory, worst, alone=True),
        Check("ports", ports, worst, alone=True),
        Check("devices", devices, worst),
        Check("peer to peer", peer_to_peer, worst),
        Check("memory of the other ranks", readable, worst),
        Check("clocks", clocks, judge_clocks),
    ]
    speeds = [
        Check(f"collectives, {way}", collectives, judge_speed, (transport,))
        for way, transport in (("as the engine chooses", "auto"), ("gloo", "gloo"))
    ]
    training = [Check(f"training at stage {stage}", train, judge_training(stage), (stage,)) for stage in range(4)]
    return [*hosts, *speeds, *training]
