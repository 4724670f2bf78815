"""Weights & Biases: one record a step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardline.config.monitoring import WandB
from shardline.events import Event
from shardline.observe.mark import Mark
from shardline.observe.pending import Pending, Row
from shardline.observe.sink import Run, Sink
from shardline.runtime.ending import has_failed

__all__ = ["WeightsAndBiases"]


class WeightsAndBiases(Sink):
    """Logs to one run of W&B, which goes on from process to process. W&B takes no step twice, nor does this sink."""

    def __init__(self, section: WandB) -> None:
        self._section = section
        self._run: Any = None
        self._mark: Mark | None = None
        self._known = 0  # steps up to this one were logged by an earlier process
        self._pending = Pending()

    def open(self, run: Run) -> None:
        import wandb

        section, known = self._section, run.state.get("id")
        self._run = wandb.init(
            project=section.project,
            group=section.group,
            entity=section.team,
            name=section.name,
            id=known,
            resume="allow" if known else None,
            config=run.config.to_dict(),
            reinit="create_new",
        )
        self._mark = Mark(Path(self._run.dir).parents[1] / f"shardline-{self._run.id}.step")
        self._known = max(self._mark.step, self._run.step - 1)

    def receive(self, event: Event) -> None:
        self._log(self._pending.add(event))

    def _log(self, rows: list[Row]) -> None:
        for step, values in rows:
            if self._mark is not None and step > self._known:
                self._run.log(values, step=step)
                self._mark.step = max(self._mark.step, step)

    def save(self) -> Mapping[str, str]:
        self._log(self._pending.pop())
        return {"id": self._run.id}

    def close(self) -> None:
        self._log(self._pending.pop())
        if self._run is not None and self._mark is not None:
            self._run.finish(exit_code=int(has_failed()))
            self._mark.close()
            self._mark = None
