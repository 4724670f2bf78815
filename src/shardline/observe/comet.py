"""Comet: one record each so many samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardline.config.monitoring import Comet as Section
from shardline.events import Event, Scalars
from shardline.observe.mark import Mark
from shardline.observe.pending import Pending, Row
from shardline.observe.sink import Run, Sink

__all__ = ["Comet"]

_FOLDER = ".cometml-runs"
"""Where Comet keeps files of its own."""


class Comet(Sink):
    """Logs to one experiment, which goes on from process to process. Comet would keep a step twice; this sink does not.

    Offline, each process leaves an archive when it ends, and one that is killed leaves none.
    """

    def __init__(self, section: Section) -> None:
        self._section = section
        self._experiment: Any = None
        self._mark: Mark | None = None
        self._known = 0  # steps up to this one were logged by an earlier process
        self._pending = Pending()
        self._own: dict[int, set[str]] = {}  # names of the user's values, by step
        self._samples = 0.0  # of the last record

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
        if not isinstance(self._experiment, comet_ml.OfflineExperiment):
            self._mark = Mark(Path(_FOLDER) / f"shardline-{self._experiment.get_key()}.step")
            self._known = self._mark.step
        self._samples = float(run.state.get("samples", 0))

    def receive(self, event: Event) -> None:
        if isinstance(event, Scalars):
            self._own.setdefault(event.step, set()).update(event.values)
        self._log(self._pending.add(event))

    def _log(self, rows: list[Row]) -> None:
        for step, values in rows:
            own, samples = self._own.pop(step, set()), values.get("train/samples", 0.0)
            if samples - self._samples >= self._section.samples_log_interval:
                self._samples = samples
            else:  # no record; what the user gives is always one
                values = {name: value for name, value in values.items() if name in own}
            if values and step > self._known:
                self._experiment.log_metrics(values, step=step)
                if self._mark is not None:
                    self._mark.step = max(self._mark.step, step)

    def save(self) -> Mapping[str, str]:
        self._log(self._pending.pop())
        return {"key": self._experiment.get_key(), "samples": f"{self._samples:.0f}"}

    def close(self) -> None:
        self._log(self._pending.pop())
        if self._experiment is not None:
            self._experiment.end()
            self._experiment = None
        if self._mark is not None:
            self._mark.close()
            self._mark = None
