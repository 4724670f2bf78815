from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import shardline.doctor
from shardline.cli import main
from shardline.comm import DONE, Group
from shardline.doctor import Check, checks, host, ranks
from shardline.doctor.verdict import judge_clocks, judge_speed, judge_training, worst
from shardline.errors import DataError
from shardline.testing import RankFailed, RankTimeout

NAMES = [check.what for check in checks()]


def lines(text):
    """Verdict and text by what was checked."""
    found = {}
    for line in text.splitlines():
        name, verdict, rest = re.fullmatch(r"(.+?) {2,}(ok|slow|failed): (.+)", line).groups()
        found[name] = (verdict, rest)
    return found


def test_two_ranks_of_this_machine(capsys):
    assert main(["doctor", "--nproc", "2"]) == 0
    found = lines(capsys.readouterr().out)
    assert list(found) == NAMES
    assert "torch" in found["versions"][1] and sys.version.split()[0] in found["versions"][1]
    for stage in (1, 2, 3):
        assert found[f"training at stage {stage}"] == ("ok", "bit for bit the weights of stage 0")
    speeds = found["collectives, gloo"][1]
    assert speeds.startswith("gloo: gather ") and "GB/s" in speeds and "row of the step" in speeds


def test_the_ranks_of_a_launcher():
    command = [sys.executable, "-m", "shardline", "run", "--nproc", "2", "-m", "shardline", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert list(lines(done.stdout)) == NAMES


def raises():
    if dist.get_rank() == 1:
        raise DataError("the disk is\nupside down.")


def returns_state(state, text):
    return state, text


def test_a_rank_that_fails_becomes_a_sentence_and_the_rest_goes_on(capsys, monkeypatch):
    faked = [
        Check("raises", raises, worst),
        Check("is slow", returns_state, worst, ("slow", "little room")),
        Check("is alone", returns_state, worst, ("failed", "no port."), alone=True),
    ]
    monkeypatch.setattr(shardline.doctor, "checks", lambda: faked)
    assert main(["doctor", "--nproc", "2"]) == 1
    found = lines(capsys.readouterr().out)
    assert found["raises"] == ("failed", "rank 1: the disk is upside down.")
    assert found["is slow"] == ("slow", "little room")
    assert found["is alone"] == ("failed", "no port.")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RankFailed("Rank 1 of 2 exited with code 3 while it ran.", 1), "Rank 1 of 2 exited with code 3 while it ran."),
        (
            RankTimeout("it took longer than 20 s.\n\nrank 1 was at\n...", 1),
            "it took longer than 20 s.",
        ),
        (RankFailed("Rank 0 failed:\n\nTraceback ...", 0, OSError("no\nroom")), "rank 0: OSError: no room"),
    ],
)
def test_a_rank_that_dies_or_hangs_becomes_a_sentence(capsys, monkeypatch, error, text):
    def measure():
        raise error

    monkeypatch.setattr(shardline.doctor, "checks", lambda: [Check("it", measure, worst, alone=True)])
    assert main(["doctor", "--nproc", "2"]) == 1
    assert capsys.readouterr().out == f"it  failed: {text}\n"


def test_what_is_left_when_the_time_is_over_has_failed(capsys, monkeypatch):
    monkeypatch.setattr("shardline.cli.doctor._SECONDS", 0.5)
    assert main(["doctor", "--nproc", "2"]) == 1
    found = lines(capsys.readouterr().out)
    assert set(found.values()) == {("failed", "no time was left after 0.5 s.")} and list(found) == NAMES


def test_slow_is_no_failure_and_one_rank_will_do(capsys, monkeypatch):
    few = [check for check in checks() if check.what not in ("training at stage 1", "training at stage 2")]
    slow = Check("is slow", returns_state, worst, ("slow", "little room"), alone=True)
    monkeypatch.setattr(shardline.doctor, "checks", lambda: [*few, slow])
    assert main(["doctor", "--nproc", "1"]) == 0
    found = lines(capsys.readouterr().out)
    assert found["is slow"][0] == "slow"
    assert found["collectives, gloo"] == ("ok", "a single rank exchanges nothing")
    assert found["training at stage 3"] == ("ok", "bit for bit the weights of stage 0")


def test_versions_that_are_too_old_or_missing(monkeypatch):
    monkeypatch.setattr(host.metadata, "requires", lambda name: ["torch>=999.1", "wandb>=1; extra == 'wandb'"])
    assert host.versions()[0] == "failed" and "Shardline needs 999.1 or newer" in host.versions()[1]
    monkeypatch.setattr(host.metadata, "requires", lambda name: ["no-such-package>=1.2"])
    assert host.versions()[1].startswith("no-such-package is not installed")


def test_shared_memory_that_is_full_small_or_closed(monkeypatch):
    class Status:
        f_frsize, f_blocks, f_bavail = 1 << 20, 64, 0

    monkeypatch.setattr(host.os, "statvfs", lambda path: Status)
    assert host.shared_memory()[0] == "failed" and "Remove what is left there" in host.shared_memory()[1]
    Status.f_bavail = 60
    assert host.shared_memory()[0] == "slow" and "--shm-size" in host.shared_memory()[1]
    monkeypatch.setattr(host.os, "access", lambda path, mode: False)
    assert host.shared_memory()[0] == "failed" and "cannot be written" in host.shared_memory()[1]


def test_no_loopback_and_a_wrong_interface(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    state, text = host.ports()
    assert state == "failed" and "the interface 'nosuch0', and this host has " in text

    def refuse(address):
        raise OSError(99, "Cannot assign requested address")

    monkeypatch.setattr(host.socket, "create_server", refuse)
    assert host.ports() == (
        "failed",
        "no connection to 127.0.0.1: cannot assign requested address. Ranks of one host meet there; bring `lo` up.",
    )


def test_devices_that_do_not_reach_each_other(monkeypatch):
    class Module:
        is_available = staticmethod(lambda: False)
        can_device_access_peer = staticmethod(lambda one, other: (one, other) != (1, 2))

    class Here:
        device = host.torch.device("cuda", 1)

    monkeypatch.setattr(host, "usable", lambda seen, asked: (host.Accelerators("cuda", 3), None))
    monkeypatch.setattr(host, "discover", lambda: Here)
    monkeypatch.setattr(host.torch, "get_device_module", lambda device: Module)
    state, text = host.peer_to_peer()
    assert state == "slow" and text.startswith("cuda:1 does not reach the memory of device 2:")


def test_verdicts_on_what_all_ranks_measured():
    assert str(worst([("ok", "a"), ("failed", "b.")], {})) == "failed: rank 1: b."
    assert judge_clocks([[10.0, 20.0], [10.5, 20.1]], {}).text == "ranks differ by 100 ms or less"
    late = judge_clocks([[10.0, 20.0], [15.5, 25.1]], {})
    assert late.state == "failed" and "the clock of rank 1 is 5.1 s ahead of that of rank 0" in late.text

    def speed(right, seconds):
        return ["gloo", {"gather": [right, seconds, 10**9]}]

    assert str(judge_speed([speed(True, 1.0), speed(True, 2.0)], {})) == "ok: gloo: gather 0.5 GB/s"
    assert judge_speed([speed(True, 1.0), speed(True, 100.0)], {}).state == "slow"
    assert str(judge_speed([speed(True, 1.0), speed(False, 1.0)], {})).startswith("failed: rank 1 got wrong numbers")

    first = {"training at stage 0": [["cpu", [1.0]], ["cpu", [1.0]]]}
    judge = judge_training(2)
    assert judge([["cpu", [1.0]]] * 2, first).state == "ok"
    assert "ranks 0 and 1 have different weights" in judge([["cpu", [1.0]], ["cpu", [2.0]]], first).text
    assert "differ from those of stage 0 by up to 0.5" in judge([["cpu", [1.5]]] * 2, first).text
    assert "are not finite" in judge([["cpu", [float("nan")]]] * 2, first).text
    assert judge([["cuda", [1.0 + 1e-6]]] * 2, first).state == "ok"


@pytest.mark.parametrize("nproc", ["0", "many"])
def test_a_wrong_number_of_ranks(capsys, nproc):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--nproc", nproc])
    assert caught.value.code == 2
    assert "is not a whole number of at least 1" in capsys.readouterr().err


def test_a_collective_that_brings_wrong_numbers_is_noticed():
    class Comm:
        data, device = Group(0, 2), torch.device("cpu")

        def __init__(self, value):
            self.value, self.gathers, self.reductions = value, self, self

        def gather(self, unit, buffer, cuts):
            buffer[cuts[1] :] = self.value
            return DONE

        def reduce(self, unit, buffer, cuts, out, *, add, scratch):
            out[:] = self.value
            return DONE

    for prepare, right, wrong in ((ranks._gather, 2.0, 1.0), (ranks._reduce, 3.0, 2.0)):
        for value in (right, wrong):
            run, is_right = prepare(Comm(value), [0, 3, 6])
            run()
            assert is_right() == (value == right)
