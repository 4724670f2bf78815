"""Comet: one record each so many samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardline.config.monitoring import Comet as Section
from shardline.events import Event, StepDone
from shardline.observe.sink import Run, Sink
from shardline.observe.values import values_of

__all__ = ["Comet"]


class Comet(Sink):
    """Logs to one experiment, which goes on from process to process."""

    def __init__(self, section: Section) -> None:
        self._section = section
        self._experiment: Any = None
        self._since = 0  # samples since the last record

    def open(self, run: Run) -> None:
        import comet_ml

        section = self._section
        self._experiment = comet_ml.start(
            workspace=section.workspace,
            project_name=section.project,
            experiment_key=run.state.get("key", section.experiment_key),
            mode="get_or_create" if "key" in run.state else section.mode,
            online=section.online,
        )
        if section.experiment_name is not None:
            self._experiment.set_name(section.experiment_name)

    def receive(self, event: Event) -> None:
        step, values = values_of(event)
        if isinstance(event, StepDone):
            self._since += event.samples
            if self._since < self._section.samples_log_interval:
                return
            self._since = 0
        if values:
            self._experiment.log_metrics(values, step=step)

    def save(self) -> Mapping[str, str]:
        return {"key": self._experiment.get_key()}

    def close(self) -> None:
        if self._experiment is not None:
            self._experiment.end()
