"""MLflow: the values of some seconds at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from shardline.config.explain import flat
from shardline.config.monitoring import MLflow as Section
from shardline.events import Event
from shardline.observe.sink import Run, Sink
from shardline.observe.values import values_of
from shardline.runtime.ending import has_failed

__all__ = ["MLflow"]

_SECONDS, _MOST = 10.0, 900  # between two batches, and values in one: MLflow takes a thousand


class MLflow(Sink):
    """Logs to one run of MLflow, which goes on from process to process. The store is asked which steps it has."""

    def __init__(self, section: Section) -> None:
        self._section = section
        self._client: Any = None
        self._id = ""
        self._last = 0  # steps up to this one are in the store
        self._rows: list[Any] = []
        self._sent = 0.0

    def open(self, run: Run) -> None:
        from mlflow.tracking import MlflowClient

        section = self._section
        self._client = client = MlflowClient(tracking_uri=section.tracking_uri)
        self._id, self._sent = run.state.get("id", ""), time.monotonic()
        if self._id:
            history = client.get_metric_history(self._id, "time/step")
            self._last = max((row.step for row in history), default=0)
            client.update_run(self._id, status="RUNNING")
            return
        found = client.get_experiment_by_name(section.experiment)
        experiment = client.create_experiment(section.experiment) if found is None else found.experiment_id
        self._id = client.create_run(experiment, run_name=section.run_name).info.run_id
        for name, value in flat(run.config).items():
            client.log_param(self._id, name, str(value)[:500])

    def receive(self, event: Event) -> None:
        from mlflow.entities import Metric

        step, values = values_of(event)
        if step > self._last:
            now = int(time.time() * 1e3)
            self._rows += [Metric(name, value, now, step) for name, value in values.items()]
        if time.monotonic() - self._sent > _SECONDS or len(self._rows) > _MOST:
            self._send()

    def _send(self) -> None:
        rows, self._rows, self._sent = self._rows, [], time.monotonic()
        for start in range(0, len(rows), _MOST):
            self._client.log_batch(self._id, metrics=rows[start : start + _MOST])

    def save(self) -> Mapping[str, str]:
        self._send()
        return {"id": self._id}

    def close(self) -> None:
        if self._client is not None:
            self._send()
            self._client.set_terminated(self._id, status="FAILED" if has_failed() else "FINISHED")
            self._client = None
