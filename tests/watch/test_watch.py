"""Waits for transfers of c10d that this rank takes in slices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from shardline.errors import LostRankError
from shardline.runtime import ending
from shardline.runtime.shared_page import PeerPage, SharedPage
from shardline.watch import Operation, Watch, Watchdog, WatchSettings
from shardline.watch.incident import Incident


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


OTHER = """
import json, os, sys
from shardline.runtime.shared_page import SharedPage
from shardline.watch.member import describe
from shardline.watch.status import SIZE
page = SharedPage(8 * SIZE)
print(json.dumps(describe(page)), flush=True)
sys.stdin.read()
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="there are no pages")
@pytest.mark.parametrize("launched", [False, True])
def test_the_watching_thread_says_which_rank_ended_where_the_main_thread_may_not(
    launched, tmp_path, monkeypatch, capsys
):
    """A launcher ends this rank a moment after the other one. What reads its own words gets the sentence instead."""
    monkeypatch.setattr(ending, "_FOLDERS", [tmp_path] if launched else [])
    command = [sys.executable, "-c", OTHER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ) as other:
        card = json.loads(other.stdout.readline())
        watch = Watch.join(0, WatchSettings(quiet_seconds=60.0), lambda mine: [mine, card])
        watchdog = Watchdog(watch, watch)
        try:
            channel = watch.channel(0)
            with channel.waiting(channel.start(Operation.GATHER, 0)):
                other.kill()
                while not watch.told:
                    time.sleep(0.01)
        finally:
            watchdog.stop()  # waits for the thread
            watch.close()
    sentence = (
        f"rank 1 (process {other.pid}) ended while rank 0 waits in the gather of unit 0 in the script's own code after "
        f"step 0. It was in the script's own code after step 0. It left no word, as after os._exit(), SIGKILL (often "
        f"for lack of memory) or a crash in C code."
    )
    assert ending.recorded_exit(other.pid, tmp_path) == (sentence if launched else "")
    assert capsys.readouterr().err == ("" if launched else f"shardline: {sentence} [SL701]\n")


@pytest.mark.skipif(sys.platform != "linux", reason="there are no pages")
def test_an_incident_that_ends_by_an_error_is_not_withdrawn(capsys):
    watch, watchdog = watched(timeout=60.0)
    watchdog.stop()
    watch.close()
    for lost in ("", "rank 1 is lost"):
        watch.lost, watchdog._said = lost, True
        watchdog._withdraw(Incident("rank 0 waits", "", (1,)), time.monotonic())
        assert ("rank 1 has come" in capsys.readouterr().err) is (not lost)


@pytest.mark.skipif(sys.platform != "linux", reason="there are no pages")
def test_a_text_that_is_no_unicode_is_shown():
    page = SharedPage(64)
    page.post("a file called \udcff")
    try:
        assert PeerPage(os.getpid(), page.fd, page.size, page.counters[0]).posted() == "a file called \\udcff"
    finally:
        page.close()
