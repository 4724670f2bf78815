"""Waits for transfers of c10d that this rank takes in slices."""

from __future__ import annotations

import json
import sys
import threading

import pytest

from shardline.errors import LostRankError
from shardline.watch import Operation, Watch, Watchdog, WatchSettings


class LateByAMoment:
    """A transfer that is over when its slice has just ended."""

    waits = 0

    def wait(self, limit):
        self.waits += 1
        if self.waits == 1:
            raise RuntimeError("Operation timed out!")

    def is_completed(self):
        return True


def test_what_is_over_right_after_a_slice_has_arrived():
    watch = Watch(0, WatchSettings())
    channel = watch.channel(0)
    channel.finish(LateByAMoment(), channel.announce(Operation.GATHER, 0))
    assert not watch.lost


def watched(timeout):
    settings = WatchSettings(quiet_seconds=0.1, timeout=timeout)
    watch = Watch.join(0, settings, lambda value: [json.loads(json.dumps(value))])
    return watch, Watchdog(watch, watch)


@pytest.mark.skipif(sys.platform != "linux", reason="there are no pages")
@pytest.mark.parametrize("says", [None, "NCCL communicator was aborted"])
def test_a_device_that_waits_for_a_transfer_that_does_not_come_is_aborted(says, capsys):
    """Nothing ends its wait but an abort, which the watching thread calls."""
    watch, watchdog = watched(timeout=0.3)
    channel, aborted = watch.channel(1), threading.Event()
    ticket = channel.start(Operation.COMPARE)
    try:
        with (
            pytest.raises(LostRankError, match=r"waited 0\.3 s for a transfer that does not come, in the comparison"),
            watch.waiting_for_device(channel, ticket, aborted.set),
        ):
            assert aborted.wait(60)
            if says is not None:
                raise RuntimeError(says)
        assert watch.lost
    finally:
        watchdog.stop()
        watch.close()


@pytest.mark.skipif(sys.platform != "linux", reason="there are no pages")
def test_an_error_of_the_device_itself_stays_as_it_is():
    watch, watchdog = watched(timeout=60.0)
    channel = watch.channel(1)
    try:
        ticket = channel.start(Operation.COMPARE)
        with pytest.raises(RuntimeError, match="illegal"), watch.waiting_for_device(channel, ticket, lambda: None):
            raise RuntimeError("an illegal memory access")
        assert not watch.lost
    finally:
        watchdog.stop()
        watch.close()
