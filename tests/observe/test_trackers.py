"""What sinks keep of a job that is killed and goes on from a checkpoint, read back by each tracker's own means."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

STEPS, KILLED, SAVED = 8, 5, 3
EVERY = list(range(1, STEPS + 1))


def trackers() -> dict[str, dict[str, object]]:
    """Sections of the trackers whose packages are there. All of them write to the current folder."""
    sections: dict[str, dict[str, object]] = {
        "tensorboard": {"enabled": True},
        "wandb": {"enabled": True},
        "mlflow": {"enabled": True, "tracking_uri": "mlflow"},
        "comet": {"enabled": True, "online": False, "samples_log_interval": 24, "experiment_name": "first"},
    }
    return {name: section for name, section in sections.items() if find_spec(PACKAGES.get(name, name))}


PACKAGES = {"comet": "comet_ml"}
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    "WANDB_MODE": "offline",
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "COMET_OFFLINE_DIRECTORY": "comet",
}
JOB = str(Path(__file__).with_name("job.py"))


def launch(folder: Path, *ranks: str, **job: object) -> subprocess.Popen[str]:
    """Start a job in ``folder``, by the launcher where ``ranks`` has its arguments."""
    module = ["-m", "shardline", "run", *ranks] if ranks else []
    return subprocess.Popen(
        [sys.executable, *module, JOB, json.dumps(job)], cwd=folder, env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def losses_of(printed: str) -> dict[int, float]:
    return dict(json.loads(line) for line in printed.splitlines() if line.startswith("["))


CONFIG = {
    "train_batch_size": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    "run_log": {"dir": "run"},
    "csv_monitor": {"enabled": True},
}


class Job:
    """The folder of a job that was killed and has gone on, and what it has printed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = {
            **CONFIG,
            "checkpoint": {"dir": "checkpoints", "every_steps": SAVED, "resume": "auto"},
            "progress_bar": {"enabled": True},
            **trackers(),
        }
        self.losses: dict[int, float] = {}
        self._run(expect=-signal.SIGKILL, end="kill", at=KILLED)
        self.error = self._run(expect=0)

    def _run(self, *, expect: int, **job: object) -> str:
        process = launch(self.folder, config=self.config, steps=STEPS, **job)
        printed, error = process.communicate(timeout=200)
        assert process.returncode == expect, error
        self.losses |= losses_of(printed)
        return error

    def lines(self) -> list[dict[str, object]]:
        return lines_of(self.folder)


def lines_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return Job(tmp_path_factory.mktemp("job"))


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


def test_the_run_log_has_every_step_once(job) -> None:
    lines = job.lines()
    done = [line for line in lines if line["event"] == "StepDone"]
    assert [line["step"] for line in done] == EVERY
    assert {line["step"]: line["loss"] for line in done} == pytest.approx(job.losses)
    assert all(len(line["grad_norms"]) == 2 and line["lr"] == [0.01, 0.02] for line in done)
    assert [line["step"] for line in lines if line["event"] == "PhaseTimes"] == EVERY
    phases = [line["seconds"] for line in lines if line["event"] == "PhaseTimes"]
    assert all({"forward", "backward", "reduce", "step"} == set(each) for each in phases)
    kinds = [line["event"] for line in lines]
    assert kinds.count("RunStarted") == 2 and kinds.count("CheckpointLoaded") == 1
    assert [line["values"] for line in lines if line["event"] == "Scalars" and line["step"] == 4] == [
        {"held out": pytest.approx(job.losses[4] / 2)}
    ]
    loaded = next(line for line in lines if line["event"] == "CheckpointLoaded")
    assert loaded["step"] == SAVED
    started = next(line for line in lines if line["event"] == "RunStarted")
    assert started["origins"]["train_batch_size"] == "given" and started["units"][0]["parameters"] == 4 * 8 + 8 + 8 + 1


def test_the_notices_of_initialize_reach_a_sink_of_the_configuration(job) -> None:
    first = job.lines()[0]
    assert first["event"] == "Notice" and first["message"].startswith("no checkpoint was loaded")


def test_csv_files_have_every_step_once(job) -> None:
    folder = job.folder / "shardline"
    head, *rows = (folder / "train_loss.csv").read_text().splitlines()
    assert head == "step,train_loss"
    assert {int(step): float(loss) for step, loss in (row.split(",") for row in rows)} == pytest.approx(job.losses)
    assert len(rows) == STEPS
    assert (folder / "held out.csv").read_text().count("\n") == 1 + STEPS // 2


def test_the_progress_bar_is_a_line_now_and_then_without_a_terminal(job) -> None:
    assert "\r" not in job.error and job.error.count("samples/s") <= 1


@needs("tensorboard")
def test_tensorboard_reads_every_step_once(job) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(job.folder / "shardline"), purge_orphaned_data=True)
    found.Reload()
    losses = found.Scalars("train/loss")
    assert [row.step for row in losses] == EVERY
    assert {row.step: row.value for row in losses} == pytest.approx(job.losses)
    assert {"train/lr_0", "train/lr_1", "train/grad_norm", "time/forward", "held out"} <= set(found.Tags()["scalars"])


def records(data: bytes) -> list[bytes]:
    """The records of a file of W&B: LevelDB's log, behind a head of 7 bytes. A record may be cut into pieces."""
    found, place, block = [], 7, 32768
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        piece = data[place + 7 : place + 7 + length]
        if kind in (1, 2):  # whole, or first
            found.append(piece)
        else:
            found[-1] += piece
        place += 7 + length
    return found


def wandb_records(folder):
    """All records of W&B's files in ``folder``, in order."""
    from wandb.proto import wandb_internal_pb2

    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            yield record


@needs("wandb")
def test_wandb_has_one_run_with_every_step_once(job) -> None:
    steps, ids = {}, set()
    for record in wandb_records(job.folder):
        if record.HasField("run"):
            ids.add(record.run.run_id)
        if record.HasField("history"):
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            assert row["_step"] not in steps, "logged twice"
            steps[row["_step"]] = row
    # W&B's own process ends with the job that is killed, and may lose what it had not written by then.
    assert len(ids) == 1 and EVERY[SAVED:] == [step for step in sorted(steps) if step > SAVED]
    assert {step: row["train/loss"] for step, row in steps.items()} == {
        step: pytest.approx(job.losses[step]) for step in steps
    }
    assert steps[4]["held out"] == pytest.approx(job.losses[4] / 2) and "time/backward" in steps[4]


@needs("mlflow")
def test_mlflow_has_one_run_with_every_step_once(job, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=str(job.folder / "mlflow"))
    (run,) = client.search_runs([client.get_experiment_by_name("shardline").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["optimizer.params.lr"] == "0.01"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(row.step for row in history) == EVERY
    assert {row.step: row.value for row in history} == pytest.approx(job.losses)


@needs("comet_ml")
def test_comet_has_an_archive_of_the_process_that_was_not_killed(job) -> None:
    """Offline, an archive is complete at the end of a process; it is what `comet upload` sends."""
    by_size = sorted((job.folder / "comet").glob("*.zip"), key=lambda each: each.stat().st_size)
    assert {each.name.partition("-")[0] for each in by_size} == {by_size[-1].name.partition("-")[0]}, "one experiment"
    with zipfile.ZipFile(by_size[-1]) as file:
        messages = [json.loads(line) for line in file.read("messages.json").splitlines()]
    metrics = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
    found: dict[str, dict[int, float]] = {}
    for row in metrics:
        assert row["step"] not in found.setdefault(row["metricName"], {}), "logged twice"
        found[row["metricName"]][row["step"]] = row["metricValue"]
    # A record each 24 samples: at steps 3 and 6, of which the killed process has logged the first.
    assert found["train/loss"] == {6: pytest.approx(job.losses[6])} and set(found["time/forward"]) == {6}
    assert found["held out"] == {step: pytest.approx(job.losses[step] / 2) for step in (4, 6, 8)}
    others = [message["payload"] for message in messages if message["type"] == "log_other"]
    assert {"first"} == {other["value"] for other in others if other["key"] == "Name"}
