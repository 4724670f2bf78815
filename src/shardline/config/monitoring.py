"""Sections of the configuration for monitoring a run: DeepSpeed's monitors, and Shardline's own sinks."""

from __future__ import annotations

from typing import Any, Literal

from shardline.config.kinds import Integer, Number, OptionalInteger, Section, key

__all__ = [
    "OF_RANK_0",
    "Comet",
    "CommsLogger",
    "CsvMonitor",
    "FlopsProfiler",
    "MLflow",
    "ProgressBar",
    "RunLog",
    "Sinks",
    "TensorBoard",
    "WandB",
]

OF_RANK_0 = frozenset({"progress_bar", "run_log", "tensorboard", "wandb", "mlflow", "comet", "csv_monitor", "sinks"})
"""Sections that only rank 0 acts on, so that ranks may differ in them: in a folder named by the time, say."""

Sinks = dict[str, dict[str, Any]]
"""Sinks that the program has registered, by name, with their arguments."""

_FOLDER = "Folder in which each run has one; empty is the current folder."
_RUN = "Name of the run's folder (DeepSpeed's default is \"DeepSpeedJobName\")."


class TensorBoard(Section):
    enabled: bool = key(False, "Write event files for TensorBoard.")
    output_path: str = key("", _FOLDER)
    job_name: str = key("shardline", _RUN)


class CsvMonitor(Section):
    enabled: bool = key(False, "Write a CSV file for each value.")
    output_path: str = key("", _FOLDER)
    job_name: str = key("shardline", _RUN)


class WandB(Section):
    enabled: bool = key(False, "Log to Weights & Biases.")
    project: str = key("shardline", 'Project of the run (DeepSpeed\'s default is "deepspeed").')
    group: str | None = key(None, "Group of the run.")
    team: str | None = key(None, "Entity that the project belongs to.")
    name: str | None = key(None, "Name of the run; null lets W&B choose one.", own=True)


class Comet(Section):
    enabled: bool = key(False, "Log to Comet.")
    samples_log_interval: Integer = key(100, "Samples between two records.", ge=1)
    project: str | None = key(None, "Project of the experiment.")
    workspace: str | None = key(None, "Workspace that the project belongs to.")
    experiment_name: str | None = key(None, "Name of the experiment.")
    experiment_key: str | None = key(None, "Key of the experiment, to go on with one that there is.")
    online: bool | None = key(None, "Send at once; false keeps records on disk.")
    mode: Literal["get", "create", "get_or_create"] | None = key(None, "Whether the experiment may or must be new.")


class MLflow(Section):
    enabled: bool = key(False, "Log to MLflow.", own=True)
    tracking_uri: str | None = key(None, "Tracking server or folder; null leaves it to MLflow.", own=True)
    experiment: str = key("shardline", "Name of the experiment.", own=True)
    run_name: str | None = key(None, "Name of the run.", own=True)


class RunLog(Section):
    dir: str | None = key(
        None, "Folder of the file events.jsonl, of which `shardline report` makes a page; null writes none.", own=True
    )


class ProgressBar(Section):
    enabled: bool = key(False, "Show a bar on rank 0; without a terminal a line every ten seconds.", own=True)
    total_steps: OptionalInteger = key(
        None, "Steps of the whole run; null takes total_num_steps of the scheduler, where it has one.", own=True, ge=1
    )


class CommsLogger(Section):
    enabled: bool = key(True, "Count transfers and bytes, and print them with the step line; on where the section is.")
    verbose: bool = key(False, "Print them at every step.")


class FlopsProfiler(Section):
    enabled: bool = key(False, "Count the floating-point operations of one step: TFLOP/s and MFU follow from them.")
    profile_step: Integer = key(1, "The step that is counted, from 1; it takes longer than others.", ge=1)
    module_depth: Integer = key(-1, "Depth of modules in the table; -1 is all of them.", ge=-1)
    detailed: bool = key(True, "Print a table of operations by module.")
    output_file: str | None = key(None, "File for the table; null prints it.")
    peak_tflops: Number | None = key(
        None, "TFLOP/s that one device can do, for MFU; null takes the data sheet's, where it is known.", own=True, gt=0
    )
