"""A job that loses ranks goes on by itself, and ends as if it had lost none."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoint import cases

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
        (2, 3, True),
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
