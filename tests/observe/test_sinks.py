"""What sinks keep of the last steps of a process, however it ends: with real processes, whose verdicts come late."""

from __future__ import annotations

import csv
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.observe.test_trackers import CONFIG, launch, lines_of, losses_of, needs, trackers, wandb_records

LAST = 5
TO_THE_LAST = list(range(1, LAST + 1))
TENSORBOARD = {"tensorboard": {"enabled": True}} if find_spec("tensorboard") else {}
SAVING = {"checkpoint": {"dir": "checkpoints", "save_on_sigterm": True}}
ENDS = {
    "destroy": {"steps": LAST, "at": 0, "expect": 0},
    "exit": {"end": "exit", "expect": 0},
    "error": {"end": "error", "expect": 1, "more": trackers()},
    "asked to end": {"end": "SIGTERM", "expect": 75, "more": SAVING},
    "ended": {"end": "SIGTERM", "expect": -signal.SIGTERM},
    "a peer crashes": {"end": "crash", "expect": 7, "ranks": ("--nproc", "2"), "rank": 1},
    "a peer fails": {"end": "error", "expect": 1, "ranks": ("--nproc", "2"), "rank": 1},
}


class Ended:
    """A job that has ended, in a folder of its own."""

    def __init__(self, folder: Path, *, expect: int, ranks: tuple[str, ...] = (), more=None, **job) -> None:
        self.folder, self.expect = folder, expect
        folder.mkdir()
        config = CONFIG | TENSORBOARD | (more or {}) | ({"train_batch_size": 16} if ranks else {})
        self._process = launch(folder, *ranks, **{"steps": LAST + 3, "at": LAST, "late": True, **job}, config=config)

    def wait(self) -> None:
        printed, self.error = self._process.communicate(timeout=200)
        self.losses, self.code = losses_of(printed), self._process.returncode


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """By the way in which it has ended. All run at once."""
    folder = tmp_path_factory.mktemp("ends")
    jobs = {way: Ended(folder / way.replace(" ", "-"), **about) for way, about in ENDS.items()}
    for job in jobs.values():
        job.wait()
    return jobs


def steps_of_log(folder: Path) -> list[int]:
    return [line["step"] for line in lines_of(folder) if line["event"] == "StepDone"]


def steps_of_csv(folder: Path) -> list[int]:
    with (folder / "shardline" / "train_loss.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def steps_of_tensorboard(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "shardline"))
    found.Reload()
    return [row.step for row in found.Scalars("train/loss")]


@pytest.mark.parametrize("way", ENDS)
def test_a_job_ends_as_it_would_without_sinks(ended, way) -> None:
    assert ended[way].code == ended[way].expect, ended[way].error


@pytest.mark.parametrize("way", [way for way in ENDS if way not in ("ended", "asked to end")])
def test_the_last_step_is_kept(ended, way) -> None:
    job = ended[way]
    steps = steps_of_log(job.folder)
    # the launcher may end this rank before it notices that a peer is lost: then the last verdict is not read
    assert steps == TO_THE_LAST or (way.startswith("a peer") and steps == TO_THE_LAST[:-1]), job.error
    assert steps_of_csv(job.folder) == steps
    assert [line["step"] for line in lines_of(job.folder) if line["event"] == "PhaseTimes"] == steps
    if TENSORBOARD:
        assert steps_of_tensorboard(job.folder) == steps


def test_a_sigterm_that_is_waited_for_loses_nothing(ended) -> None:
    job = ended["asked to end"]
    (saved,) = [line["step"] for line in lines_of(job.folder) if line["event"] == "CheckpointSaved"]
    assert saved > LAST and steps_of_log(job.folder) == steps_of_csv(job.folder) == list(range(1, saved + 1))
    if TENSORBOARD:
        assert steps_of_tensorboard(job.folder) == list(range(1, saved + 1))


def test_one_that_ends_the_process_takes_the_step_that_is_not_known_yet(ended) -> None:
    """No code of the process runs any more: what was known is in the files of the log and of TensorBoard."""
    job = ended["ended"]
    assert steps_of_log(job.folder) == TO_THE_LAST[:-1]
    if TENSORBOARD:
        assert steps_of_tensorboard(job.folder) == TO_THE_LAST[:-1]


@needs("wandb")
def test_wandb_knows_that_the_run_has_failed(ended) -> None:
    found = list(wandb_records(ended["error"].folder))
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [1]
    items = [item for record in found if record.HasField("history") for item in record.history.item]
    steps = [item.value_json for item in items if item.nested_key == ["_step"]]
    assert list(map(int, steps)) == TO_THE_LAST


@needs("mlflow")
def test_mlflow_knows_that_the_run_has_failed(ended, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=str(ended["error"].folder / "mlflow"))
    (run,) = client.search_runs([client.get_experiment_by_name("shardline").experiment_id])
    assert run.info.status == "FAILED"
    assert sorted(row.step for row in client.get_metric_history(run.info.run_id, "train/loss")) == TO_THE_LAST


@needs("tensorboard")
def test_files_of_tensorboard_are_read_in_the_order_of_processes(tmp_path, monkeypatch) -> None:
    """Also where a second process begins within a second, or on a host whose clock is behind."""
    import shardline.observe.tensorboard as module
    from shardline.config import load_config
    from shardline.events import Scalars
    from shardline.observe import Run

    config = load_config({"train_batch_size": 8}, 1)
    for at, (clock, pid) in enumerate([(1000, 99), (1000, 100), (900, 7)]):
        monkeypatch.setattr(module.time, "time", lambda clock=clock: clock + 0.5)
        monkeypatch.setattr(module.os, "getpid", lambda pid=pid: pid)
        sink = module.TensorBoard(tmp_path / "shardline")
        sink.open(Run(config, step=at))
        for step in range(at + 1, at + 4):  # the process before has logged two of them
            sink.receive(Scalars(step, {"train/loss": 10.0 * at}))
        sink.close()
    assert steps_of_tensorboard(tmp_path) == [1, 2, 3, 4, 5]
