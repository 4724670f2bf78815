"""Waits for transfers of c10d that this rank takes in slices."""

from __future__ import annotations

from shardline.watch import Operation, Watch, WatchSettings


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
