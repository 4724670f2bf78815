"""A job that loses ranks goes on by itself, and ends as if it had lost none."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.checkpoint import cases
from tests.harness import assert_close
from tests.sockets import free_port, listening

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks end with their launcher on Linux only")

STEPS = 30

JOB = """
import json, os, random, signal, sys, threading
sys.path[:0] = {path!r}
import torch
from tests.checkpoint import cases
settings, kills, seed, folder = json.loads(sys.argv[1])
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
draw = random.Random(seed * 1000 + attempt)
victim, after, seconds, early = draw.randrange(2), draw.randrange(4), draw.random() * 0.1, draw.random() < 0.2
killer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
doomed = attempt < kills and rank == victim
if doomed and early:
    killer.start()
built = cases.engine(settings)
begun = built.global_steps
for step in range(begun, {steps}):
    if doomed and not early and step == min(begun + after, {steps} - 1):
        killer.start()
    cases.train(built, step + 1)
    if rank == 0:
        with open(f"{{folder}}/attempt{{attempt}}", "w") as file:
            file.write(f"{{begun}} {{step + 1}}")
weights = built.full_state_dict()
built.destroy()
if doomed:
    killer.join()
    signal.pause()
if rank == 0:
    torch.save(weights, f"{{folder}}/weights.pt")
"""


def weights_of(settings, steps):
    built = cases.engine(settings)
    cases.train(built, steps)
    weights = built.full_state_dict()
    built.destroy()
    return weights


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("kills", "stage", "background"),
    [
        (1, 3, True),
        pytest.param(20, 3, False, marks=pytest.mark.slow),
        pytest.param(20, 1, True, marks=pytest.mark.slow),
    ],
)
def test_ranks_that_are_killed_at_random_moments_cost_no_more_than_a_few_steps(
    ranks, tmp_path, kills, stage, background
):
    """In start, training, saving, with a window of two micro-steps: the last weights are those of a run without it."""
    (straight, _) = ranks(weights_of, 2, cases.config(stage, 2, accumulation=2), STEPS)
    every = 2
    checkpoint = {"dir": str(tmp_path / "saves"), "every_steps": every, "keep": 2, "async": background,
                  "resume": "auto", "save_on_sigterm": True}  # fmt: skip
    settings = cases.config(stage, 2, accumulation=2, checkpoint=checkpoint)
    script, seed = tmp_path / "script.py", random.randrange(1000)
    script.write_text(JOB.format(path=sys.path, steps=STEPS))
    command = [
        sys.executable,
        "-m",
        "shardline",
        "run",
        "--nproc",
        "2",
        "--device",
        "cpu",
        "--max-restarts",
        str(kills),
    ]
    done = subprocess.run(
        [*command, str(script), json.dumps([settings, kills, seed, str(tmp_path)])],
        capture_output=True, text=True, timeout=1150,
    )  # fmt: skip
    assert done.returncode == 0, (seed, done.stderr)
    assert done.stderr.count(f" of {kills}.\n") == kills, (seed, done.stderr)
    reached = 0
    for attempt in range(kills + 1):
        if (file := Path(tmp_path, f"attempt{attempt}")).exists():  # else it was killed before its first step
            begun, last = map(int, file.read_text().split())
            assert begun >= reached // every * every - every * background, (seed, attempt)
            reached = max(reached, last)
    assert reached == STEPS
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert list(weights) == list(straight)
    assert all(torch.equal(value, straight[name]) for name, value in weights.items()), seed


# -- hosts that come and go --------------------------------------------------------------------------------------------

LAUNCHER = """
import sys
from datetime import timedelta
sys.path[:0] = {path!r}
from shardline.launch import rendezvous
rendezvous._LAST_CALL = timedelta(seconds=2)
rendezvous._HEARTBEAT_SECONDS = 1
from shardline.cli import main
sys.exit(main(sys.argv[1:]))
"""

HOSTED = """
import json, os, sys, time
sys.path[:0] = {path!r}
import torch
from tests.checkpoint import cases
settings, steps, folder = json.loads(sys.argv[1])
built = cases.engine(settings, dropout=False)
world, rank = built.world_size, int(os.environ["RANK"])
for step in range(built.global_steps, steps):
    while step in (4, 8, 10) and not os.path.exists(f"{{folder}}/on{{step}}") and not built.checkpoints.exit_requested:
        open(f"{{folder}}/at{{step}}-{{world}}-{{rank}}", "w").close()
        time.sleep(0.02)
    _, samples, _ = cases.train(built, step + 1)
    with open(f"{{folder}}/samples-{{step}}-{{world}}-{{rank}}", "w") as file:
        json.dump(samples, file)
weights = built.full_state_dict()
built.destroy()
if rank == 0:
    torch.save(weights, f"{{folder}}/weights.pt")
"""


def straight_run(settings, steps):
    """The weights, and the samples of each global batch."""
    built = cases.engine(settings, dropout=False)
    order = [sorted(cases.train(built, step + 1)[1][0]) for step in range(steps)]
    weights = built.full_state_dict()
    built.destroy()
    return weights, order


@contextmanager
def hosts(count, tmp_path, arguments, inside=lambda number: (), master="127.0.0.1"):
    """Launchers, each of which stands for a host, and a function that starts one more."""
    port = free_port()
    secret, launcher = tmp_path / "secret", tmp_path / "launcher.py"
    secret.write_text("a secret of enough letters")
    secret.chmod(0o600)
    launcher.write_text(LAUNCHER.format(path=sys.path))
    options = ["--nproc", "1", "--device", "cpu", "--nnodes", f"1:{count}", "--master", f"{master}:{port}"]
    started = []

    def start():
        command = [*inside(len(started)), sys.executable, str(launcher), "run", *options, "--max-restarts", "3"]
        command += ["--secret-file", str(secret), *arguments]
        with tempfile.NamedTemporaryFile(dir=tmp_path, prefix="host", suffix=".txt", delete=False) as said:
            started.append(subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT))

    try:
        start()
        wait_until(lambda: listening(started[0].pid), "no launcher listens", started)
        for _ in range(count - 1):
            start()
        yield started, start
    finally:
        for process in started:
            process.kill()
            process.wait()


def wait_until(condition, what, started, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and any(process.poll() is None for process in started), what
        time.sleep(0.02)


def samples_of(folder, step, world):
    """All ranks' samples of a step, of the attempt that had ``world`` ranks."""
    found = []
    for file in folder.glob(f"samples-{step}-{world}-*"):
        found += [index for micro in json.loads(file.read_text()) for index in micro]
    return sorted(found)


def lose_and_gain(ranks, tmp_path, count, gain, lose=lambda process: process.kill(), more=None, **options):
    """At step 4 the last host is lost, at step 8 another one comes. 10 samples a step are not alike on each."""
    steps, fewer = 12, count - 1
    settings = cases.config(2, count, batch=10, communication_transport="gloo")
    ((weights, order),) = ranks(straight_run, 1, settings, steps)
    checkpoint = {"dir": str(tmp_path / "saves"), "every_steps": 3, "resume": "auto", "save_on_sigterm": True}
    script = tmp_path / "script.py"
    script.write_text(HOSTED.format(path=sys.path))
    settings |= (more or {}) | {
        "checkpoint": checkpoint,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
    }
    arguments = [str(script), json.dumps([settings, steps, str(tmp_path)])]

    def at(step, world):
        return lambda: len(list(tmp_path.glob(f"at{step}-{world}-*"))) == world

    with hosts(count, tmp_path, arguments, **options) as (started, start):
        try:
            wait_until(at(4, count), "the hosts did not meet", started)
            lose(started[-1])
            lost = started.pop()
            (tmp_path / "on4").touch()
            wait_until(at(8, fewer), "the others did not go on", started)
            if gain:
                start()  # the ranks that wait are told, save, and start again with it
                wait_until(at(10, count), "the new host did not join", started)
            (tmp_path / "on8").touch()
            (tmp_path / "on10").touch()
            codes = [process.wait(90) for process in started]
            assert codes == [0] * len(started)
        except AssertionError as error:
            raise AssertionError({file.name: file.read_text() for file in tmp_path.glob("host*.txt")}) from error
        finally:
            lost.wait()
    for step in set(range(steps)) - ({8} if gain else set()):  # a save at SIGTERM ends the script there
        world = count if step < 3 or (gain and step > 8) else fewer
        assert samples_of(tmp_path, step, world) == order[step], step
    assert_close(torch.load(tmp_path / "weights.pt", weights_only=True), weights)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("count", "gain"), [(2, False), pytest.param(3, True, marks=pytest.mark.slow)])
def test_a_host_fewer_goes_on_with_the_same_global_batches(ranks, tmp_path, count, gain):
    lose_and_gain(ranks, tmp_path, count, gain)


@pytest.fixture
def network():
    """A switch and hosts 10.77.0.1 and so on, each a network namespace: commands that run inside, and a way to cut."""
    made = []

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    def add(name):
        ip("netns", "add", name)
        made.append(name)

    name = f"shardline{os.getpid()}-"
    try:
        if shutil.which("ip") is None:
            pytest.skip("there is no `ip` to make network namespaces with")
        try:
            add(f"{name}switch")
            ip("-n", f"{name}switch", "link", "add", "switch", "type", "bridge")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces may not be made here: {error.stderr.strip()}")
        ip("-n", f"{name}switch", "link", "set", "switch", "up")
        for number in range(3):
            add(f"{name}{number}")
            ip("-n", f"{name}switch", "link", "add", f"to{number}", "type", "veth", "peer", "eth0", "netns", made[-1])
            ip("-n", f"{name}switch", "link", "set", f"to{number}", "master", "switch", "up")
            ip("-n", made[-1], "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", made[-1], "link", "set", device, "up")
        yield (
            lambda number: ("ip", "netns", "exec", f"{name}{number}"),
            lambda number: ip("-n", f"{name}switch", "link", "set", f"to{number}", "down"),
        )
    finally:
        for each in made:
            subprocess.run(["ip", "netns", "del", each], check=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_host_that_falls_silent_is_lost(ranks, tmp_path, network):
    """Its link is cut, so no other host hears that its connections have ended: they wait for the configured time."""
    inside, cut = network

    def lose(process):
        cut(2)
        process.kill()

    more = {"watchdog": {"timeout_seconds": 10}}
    lose_and_gain(ranks, tmp_path, 3, False, lose, more, inside=inside, master="10.77.0.1")
