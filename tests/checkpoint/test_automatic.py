"""Saving and resuming by itself, in the background, at SIGTERM, and after a SIGKILL in the middle of a save."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from shardline.checkpoint.engine import saver, staging
from shardline.checkpoint.format import commit
from shardline.checkpoint.format.faults import EVERY_RANK, OVERWRITE, POINTS
from shardline.errors import CheckpointError
from shardline.testing import RankFailed, run_distributed
from tests.checkpoint import cases
from tests.harness import full


def settings(path, stage=2, world=2, **checkpoint):
    return cases.config(stage, world, checkpoint={"dir": str(path), **checkpoint})


def weights_after(config, steps, fault=None, rank_state=None):
    """Train to ``steps``; the weights, where the run began, and its client state."""
    if fault is not None:
        os.environ["SHARDLINE_FAULT"] = fault
    built = cases.engine(config)
    begun = built.global_steps
    if rank_state is not None:
        built.client_state["note"] = rank_state
    cases.train(built, steps)
    result = (built.full_state_dict(), begun, dict(built.client_state))
    built.destroy()
    return result


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("background", [False, True])
def test_a_run_saves_and_resumes_by_itself(ranks, tmp_path, background):
    straight = ranks(weights_after, 2, cases.config(2, 2), 7)
    config = settings(tmp_path, every_steps=2, keep=2, resume="auto", **{"async": background})
    first = ranks(weights_after, 2, config, 5, None, "kept")
    assert [begun for _, begun, _ in first] == [0, 0]
    assert sorted(path.name for path in tmp_path.glob("global*")) == ["global_step2", "global_step4"]
    again = ranks(weights_after, 2, config, 7)
    for (weights, begun, state), (expected, _, _) in zip(again, straight, strict=True):
        assert begun == 4 and state == {"note": "kept"} and same(weights, expected)
    assert sorted(path.name for path in tmp_path.glob("global*")) == ["global_step4", "global_step6"]
    assert ranks(weights_after, 2, settings(tmp_path, resume="global_step4"), 4)[0][1] == 4
    with pytest.raises(RankFailed, match=r"there is no .*global_step2"):
        ranks(weights_after, 2, settings(tmp_path, resume="global_step2"), 4)


def in_background(path):
    """Back-pressure, an error that is not lost, and that training goes on."""
    built = cases.engine(cases.config(2, 2))
    cases.train(built, 1)
    gate, original, running = threading.Event(), commit.write, []

    def slow(*args):
        running.append(1)
        assert len(running) == 1, "two saves at once"
        assert gate.wait(30)
        running.pop()
        return original(*args)

    def full_disk(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard")

    commit.write = slow
    try:
        built.save_checkpoint(path, tag="one", async_save=True)
        cases.train(built, 3)  # while nothing is written yet
        before = Path(path, "one").exists()
        threading.Timer(0.2, gate.set).start()
        built.save_checkpoint(path, tag="two", async_save=True)  # waits for the first
        after = Path(path, "one").exists()
        built.checkpoints.wait()
        commit.write = full_disk if built.comm.data.rank == 1 else original
        built.save_checkpoint(path, tag="three", async_save=True)
        cases.train(built, 4)
        try:
            built.save_checkpoint(path, tag="four")
            error = None
        except CheckpointError as caught:
            error = str(caught)
        commit.write = original
        built.save_checkpoint(path, tag="four")
    finally:
        commit.write = original
    built.destroy()
    return before, after, error


def load_steps(path, config, tag=None):
    built = cases.engine(config)
    built.load_checkpoint(path, tag)
    steps = built.global_steps
    built.destroy()
    return steps


def test_in_the_background(ranks, tmp_path):
    for before, after, error in ranks(in_background, 2, str(tmp_path)):
        assert (before, after) == (False, True)
        assert "was not written in the background" in error and "on rank 1: No space left on device" in error
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["four", "latest", "one", "two"]
    # What was saved is the moment of the call, though training went on while it was written.
    assert ranks(load_steps, 2, str(tmp_path), cases.config(2, 2), "one") == [1, 1]
    assert ranks(load_steps, 1, str(tmp_path), cases.config(0, 1), "two") == [3]


def moments(built):
    """Copies of the optimizer's tensors."""
    states = [built.optimizer.state[run.param] for run in built.trainables.layout.runs if run.fragments]
    return [state[key].clone() for state in states for key in sorted(state)]


def late_copies(patch, event, seconds=0.0):
    """What is copied in the background is copied ``seconds`` after ``event``."""
    original = staging._copy

    def late(pairs):
        if threading.current_thread().name == "shardline-checkpoint":
            assert event.wait(30)
            time.sleep(seconds)
        original(pairs)

    patch.setattr(staging, "_copy", late)


def staged_late(path):
    """A save in the background whose copies of the optimizer's state begin when the next step is reached."""
    built = cases.engine(cases.config(2, 2))
    cases.train(built, 2)
    expected, weights = moments(built), built.full_state_dict()
    reached, waited = threading.Event(), built.checkpoints.before_step

    def reach():
        reached.set()
        waited()

    with pytest.MonkeyPatch.context() as patch:
        late_copies(patch, reached, 0.3)  # a step that does not wait would be over
        patch.setattr(built.checkpoints, "before_step", reach)
        built.save_checkpoint(path, tag="two", async_save=True)
        for param in built.module.parameters():  # weights may change at once
            param.data.mul_(1.5)
        cases.train(built, 3)
        built.checkpoints.wait()
    changed = not all(map(torch.equal, expected, moments(built)))
    built.load_checkpoint(path, "two")
    result = changed, all(map(torch.equal, expected, moments(built))), same(weights, built.full_state_dict())
    built.destroy()
    return result


def test_a_step_waits_until_its_state_is_copied(ranks, tmp_path):
    assert ranks(staged_late, 2, str(tmp_path)) == [(True, True, True)] * 2


def refuse(*args):
    raise RuntimeError("refused on purpose")


def staged_badly(path):
    """What one rank's background save says when it could not copy, and that everything goes on."""
    built = cases.engine(cases.config(2, 2))
    cases.train(built, 2)
    said, gate = [], threading.Event()

    def save(meanwhile=lambda: None):
        built.save_checkpoint(path, tag="bad", async_save=True)
        meanwhile()
        with pytest.raises(CheckpointError) as caught:
            built.checkpoints.wait()
        said.append(str(caught.value))

    def edit():
        if built.comm.data.rank == 1:
            for run in built.trainables.layout.runs:
                built.optimizer.state[run.param]["exp_avg"].zero_()
        gate.set()

    with pytest.MonkeyPatch.context() as patch:  # while weights are copied
        if built.comm.data.rank == 1:
            patch.setattr(staging.Staging, "_place", refuse)
        save()
    with pytest.MonkeyPatch.context() as patch:  # an edit where nothing but a step may
        late_copies(patch, gate)
        save(meanwhile=edit)
    cases.train(built, 3)
    with torch.inference_mode():
        built.checkpoints._saver._staging.clear()
        built.save_checkpoint(path, tag="good", async_save=True)
    built.checkpoints.wait()
    built.destroy()
    return said


def test_copies_that_cannot_be_made(ranks, tmp_path):
    for first, second in ranks(staged_badly, 2, str(tmp_path)):
        assert "on rank 1: RuntimeError: refused on purpose" in first
        assert "'state.exp_avg/" in second and "was changed while it was copied" in second and "on rank 1" in second
    assert sorted(path.name for path in tmp_path.glob("[a-z]*")) == ["good", "latest"]
    assert ranks(load_steps, 2, str(tmp_path), cases.config(2, 2)) == [3, 3]


def without_a_thread(path):
    """A save whose thread does not start, and the next one, whose thread does."""
    built = cases.engine(cases.config(2, 1))
    cases.train(built, 1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError) as caught:
        patch.setattr(threading.Thread, "start", refuse)
        built.save_checkpoint(path, async_save=True)
    cases.train(built, 2)
    built.save_checkpoint(path, async_save=True)
    built.destroy()
    return str(caught.value)


def test_a_thread_that_does_not_start(ranks, tmp_path):
    assert ranks(without_a_thread, 1, str(tmp_path)) == ["refused on purpose"]
    assert ranks(load_steps, 1, str(tmp_path), cases.config(2, 1)) == [2]


SCRIPT = """
import sys, time
from shardline.checkpoint.format import commit
from tests.checkpoint import cases
original = commit.write
commit.write = lambda *args: (time.sleep(0.5), original(*args))[1]
built = cases.engine(cases.config(0, 1))
cases.train(built, 1)
built.save_checkpoint(sys.argv[1], async_save=True)
"""


def test_exit_waits_for_it(ranks, tmp_path):
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], check=True, capture_output=True, timeout=200)
    assert ranks(load_steps, 1, str(tmp_path), cases.config(0, 1)) == [1]


FAILS = """
import multiprocessing, os, sys
from shardline.checkpoint.format import commit
from tests.checkpoint import cases

def full_disk(*args):
    raise OSError(28, os.strerror(28), "shard")

def save(path):
    world = int(os.environ.get("WORLD_SIZE", 1))
    built = cases.engine(cases.config(0, world))
    cases.train(built, 1)
    if built.comm.data.rank == world - 1:
        commit.write = full_disk
    built.save_checkpoint(path, async_save=True)

if __name__ == "__main__":
    if len(sys.argv) > 2:
        child = multiprocessing.get_context("spawn").Process(target=save, args=sys.argv[1:2])
        child.start()
        child.join()
        print("the child ended with", child.exitcode)
    save(sys.argv[1])
    print("the script is over")
    sys.exit(0)
"""
SAID = "the last checkpoint was not written in the background: writing the checkpoint"


def start_failing(tmp_path, *command, more=()):
    """Run the script in which the last save fails on the last rank; ``command`` starts it."""
    script = tmp_path / "script.py"
    script.write_text(FAILS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "saves"), *more],
        capture_output=True, text=True, timeout=200, env=environment,
    )  # fmt: skip
    assert "the script is over" in done.stdout, done.stderr
    return done


def test_a_script_whose_last_save_failed_does_not_end_well(tmp_path):
    """Without destroy(), with an engine that is gone, after sys.exit(0), and in a process of multiprocessing."""
    done = start_failing(tmp_path, sys.executable, more=["and in a child"])
    assert done.returncode == 1 and "the child ended with 1" in done.stdout
    assert done.stderr.count(f"shardline: {SAID}") == 2 and "No space left on device" in done.stderr


@pytest.mark.parametrize("launcher", ["shardline", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_job_whose_last_save_failed_does_not_end_well(tmp_path, launcher):
    """Only rank 1 could not write: both ranks say so, and end with a code other than 0."""
    options = {
        "shardline": ["-m", "shardline.cli", "run", "--nproc", "2"],
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    }[launcher]
    done = start_failing(tmp_path, sys.executable, *options)
    assert done.returncode != 0
    assert f"{SAID} {tmp_path}" in done.stderr and "failed on rank 1: No space left on device" in done.stderr
    if launcher == "shardline":
        assert f"CheckpointError: {SAID}" in done.stderr.partition("shardline run: rank")[2]


LONG_STEP = """
import os, sys, time
import torch
from tests.checkpoint import cases
built = cases.engine(cases.config(0, 1, checkpoint={"dir": sys.argv[1], "save_on_sigterm": True}))
cases.train(built, 1)
print("in a step", flush=True)
time.sleep(7)  # longer than any wait
cases.train(built, 10)
"""


@pytest.mark.parametrize(
    ("name", "whom"),
    [("SIGUSR1", "both"), ("SIGTERM", "rank"), pytest.param("SIGTERM", "both", marks=pytest.mark.slow)],
)
def test_a_step_that_takes_long_is_finished_and_saved(ranks, tmp_path, name, whom):
    """The launcher and its rank are asked to end, as a batch system does, and the rank again while the step lasts.
    Where the rank alone is asked it ends the job just as well, and is not started again."""
    number = getattr(signal, name)
    script = tmp_path / "script.py"
    script.write_text(LONG_STEP)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "shardline.cli", "run", "--nproc", "1", "--max-restarts", "1"]
    command += [str(script), str(tmp_path / "saves")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "in a step\n"
        (rank,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        os.kill(rank, number)
        if whom == "both":
            os.kill(process.pid, number)
        time.sleep(5.5)
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, number)
        _, said = process.communicate(timeout=200)
    assert process.returncode == 75
    assert f"ended with exit code 75, as {name} asked: start again to go on" in said
    assert said.endswith("shardline run: the ranks have saved; start again to go on (exit code 75).\n")
    assert ranks(load_steps, 1, str(tmp_path / "saves"), cases.config(0, 1)) == [2]


def ended(config, who):
    """Rank ``who`` gets SIGTERM in the middle of step 3; the step where this rank ended, and how."""
    built = cases.engine(config)
    cases.train(built, 2)
    if built.comm.data.rank == who:
        os.kill(os.getpid(), signal.SIGTERM)
    try:
        cases.train(built, 10)
    except SystemExit as exit:
        return built.global_steps, exit.code, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    return None


def test_sigterm_on_one_rank_saves_and_ends_all(ranks, tmp_path):
    config = settings(tmp_path, save_on_sigterm=True, resume="auto")
    assert ranks(ended, 2, config, 1) == [(3, 75, True), (3, 75, True)]
    straight = ranks(weights_after, 2, cases.config(2, 2), 6)
    again = ranks(weights_after, 2, config, 6)
    assert again[0][1] == 3 and same(again[0][0], straight[0][0])


def ended_after_a_failure(config):
    """The save after step 1 fails in the background; then comes SIGTERM."""
    built = cases.engine(config)
    write, commit.write = commit.write, full_disk
    cases.train(built, 1)
    built.checkpoints._saver._running._thread.join()
    commit.write = write
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as exit:
        cases.train(built, 10)
    return built.global_steps, exit.value.code


def full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard")


def test_sigterm_saves_although_the_save_before_failed(ranks, tmp_path):
    config = settings(tmp_path, world=1, every_steps=1, save_on_sigterm=True, **{"async": True})
    assert ranks(ended_after_a_failure, 1, config) == [(2, 75)]
    assert ranks(load_steps, 1, str(tmp_path), cases.config(0, 1)) == [2]


# -- SIGKILL in real jobs ---------------------------------------------------------------------------------------------

LATE = ("commit-barrier:before", "commit-barrier:after")
SOME = [("shard-write:middle", 1, False), ("rename:after", 0, True)]
SYNCHRONOUS = ("shard-write:before", "shard-barrier:after", "manifest-write:middle", "rename:before", "latest:before")
MANY = [
    (point, rank, background)
    for point in POINTS
    for rank in ((0, 1) if point in EVERY_RANK else (0,))
    for background in (True, False)
    if (background or point in SYNCHRONOUS) and point not in (*OVERWRITE, "remove-old:middle", "remove-old:after")
]
"""Every point of a save in the background that overwrites nothing, and some of one that training waits for."""


def kill_a_job(ranks, tmp_path, point, rank, background):
    """A job saves every step; it is killed while it saves step 3, after the first two saves went well."""
    config = settings(tmp_path, stage=3, every_steps=1, resume="auto", **{"async": background})
    run_distributed(weights_after, 2, config, 2)
    with pytest.raises(RankFailed, match=f"Rank {rank} of 2 was killed by SIGKILL"):
        run_distributed(weights_after, 2, config, 6, f"{point}@{rank}")
    straight = ranks(weights_after, 2, cases.config(3, 2), 6)
    committed = rank == 0 and point in (*POINTS[POINTS.index("rename:after") :], *LATE)
    either = rank == 1 and point in ("shard-barrier:after", *LATE)  # rank 0 may get there by itself
    for weights, where, _ in ranks(weights_after, 2, config, 6):
        assert where == (3 if committed else 2) or (either and where == 3)
        assert same({k: v for k, v in weights.items() if not k.startswith("norm")}, straight[0][0])


@pytest.mark.parametrize(("point", "rank", "background"), SOME)
def test_a_killed_job_resumes_bitwise(ranks, tmp_path, point, rank, background):
    kill_a_job(ranks, tmp_path, point, rank, background)


@full
@pytest.mark.parametrize(("point", "rank", "background"), MANY)
def test_jobs_killed_at_many_points_resume_bitwise(ranks, tmp_path, point, rank, background):
    kill_a_job(ranks, tmp_path, point, rank, background)


def test_the_environment_names_a_point(monkeypatch):
    monkeypatch.setenv("SHARDLINE_FAULT", "rename:before@1")
    assert saver.fault() == "rename:before@1"
