"""Which sinks a configuration asks for: those of this package, and those that a program has registered."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shardline.config import Config
from shardline.errors import ConfigError
from shardline.names import closest
from shardline.observe.console import Console
from shardline.observe.csv_files import CsvFiles
from shardline.observe.jsonl import JsonLines
from shardline.observe.progress import ProgressBar
from shardline.observe.sink import Sink

__all__ = ["check_packages", "register", "sinks_of"]

_REGISTERED: dict[str, Callable[..., Sink]] = {}

_PACKAGES = {
    "tensorboard": ("tensorboard", "pip install 'shardline[tensorboard]'"),
    "wandb": ("wandb", "pip install 'shardline[wandb]'"),
    "mlflow": ("mlflow", "pip install 'shardline[mlflow]'"),
    "comet": ("comet_ml", "pip install 'shardline[comet]'"),
}
"""By section: the package that it needs, and how to get it."""


def register(name: str, make: Callable[..., Sink]) -> None:
    """Let ``"sinks": {name: {...}}`` in a configuration stand for ``make(...)``, whose arguments it holds."""
    _REGISTERED[name] = make


def check_packages(config: Config) -> None:
    """See that everything that ``config`` asks for is there. On every rank, as each would need it alone.

    Raises:
        ConfigError: for a package that is not installed, or a name that is not registered.
    """
    for section, (package, remedy) in _PACKAGES.items():
        if getattr(config, section).enabled and find_spec(package) is None:
            raise ConfigError(
                f"{section}.enabled is true, and the package {package} is not installed. Install it ({remedy}) or "
                f"delete the section."
            )
    for name in config.sinks:
        if name not in _REGISTERED:
            near = f"; did you mean {close}?" if (close := closest(name, _REGISTERED)) else ""
            raise ConfigError(
                f'sinks holds "{name}", which was not registered with shardline.observe.register before initialize'
                f"{near}"
            )


def sinks_of(config: Config) -> dict[str, Sink]:
    """New sinks by name, not opened; their folders are made. Called on rank 0.

    Raises:
        ConfigError: a folder that a section names cannot be made or written to.
    """
    made: dict[str, Sink] = {"console": Console.of(config)}
    if config.progress_bar.enabled:
        made["progress_bar"] = ProgressBar(config.progress_bar.total_steps or _scheduled(config))
    if config.run_log.dir is not None:
        _make("run_log.dir", Path(config.run_log.dir))
        made["run_log"] = JsonLines(config.run_log.dir)
    if config.csv_monitor.enabled:
        folder = Path(config.csv_monitor.output_path, config.csv_monitor.job_name)
        _make("csv_monitor.output_path", folder)
        made["csv_monitor"] = CsvFiles(folder)
    if config.tensorboard.enabled:
        from shardline.observe.tensorboard import TensorBoard

        folder = Path(config.tensorboard.output_path, config.tensorboard.job_name)
        _make("tensorboard.output_path", folder)
        made["tensorboard"] = TensorBoard(folder)
    if config.wandb.enabled:
        from shardline.observe.wandb import WeightsAndBiases

        made["wandb"] = WeightsAndBiases(config.wandb)
    if config.mlflow.enabled:
        from shardline.observe.mlflow import MLflow

        made["mlflow"] = MLflow(config.mlflow)
    if config.comet.enabled:
        from shardline.observe.comet import Comet

        made["comet"] = Comet(config.comet)
    return made | {name: _REGISTERED[name](**arguments) for name, arguments in config.sinks.items()}


def _make(key: str, folder: Path) -> None:
    """Make ``folder`` now: a mistake in it is told before training, and not by the first step."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK | os.X_OK) else "permission denied"
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    if reason:
        raise ConfigError(
            f"{key}: rank 0 cannot write to the folder {folder}: {reason}. Name one that it can write to."
        )


def _scheduled(config: Config) -> int | None:
    params: dict[str, Any] = {} if config.scheduler is None else config.scheduler.params
    total = params.get("total_num_steps")
    return total if isinstance(total, int) else None
