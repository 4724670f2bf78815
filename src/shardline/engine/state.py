"""One engine as a checkpoint sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shardline.checkpoint.engine.view import EngineView
from shardline.data import Loader
from shardline.engine.backwards import Backwards
from shardline.engine.batch_tracker import BatchTracker
from shardline.engine.outcome import Outcome
from shardline.engine.trainables import Trainables
from shardline.sharding.window import Window

if TYPE_CHECKING:
    from shardline.engine.engine import Engine

__all__ = ["EngineState"]


class EngineState:
    """The :class:`shardline.checkpoint.engine.trainer.Trainer` of an engine; attributes are the engine's."""

    def __init__(
        self,
        engine: Engine,
        trainables: Trainables,
        window: Window,
        batches: BatchTracker,
        backwards: Backwards,
        outcome: Outcome,
    ) -> None:
        self.module, self.optimizer = engine.module, engine.optimizer
        self.config, self.comm, self.events, self.scaler = engine.config, engine.comm, engine.events, engine.scaler
        self.window_start = engine.window_start
        self._engine, self._trainables, self._window = engine, trainables, window
        self._batches, self._backwards, self._outcome = batches, backwards, outcome

    @property
    def lr_scheduler(self) -> Any:
        """What the user has put there by now."""
        return self._engine.lr_scheduler

    @property
    def training_dataloader(self) -> Loader | None:
        """The engine's own loader."""
        return self._batches.loader

    @property
    def client_state(self) -> dict[str, Any]:
        """The user's values, which automatic saves include."""
        return self._engine.client_state

    @client_state.setter
    def client_state(self, state: dict[str, Any]) -> None:
        self._engine.client_state = state

    @property
    def global_steps(self) -> int:
        """Steps so far. Asking waits for nothing."""
        return self._engine.progress.global_steps

    def save_sinks(self) -> dict[str, dict[str, str]]:
        """Have sinks write what is left; returns what they need to go on with the same run, by name."""
        return self._engine.sinks.save()

    def checkpoint_view(self) -> EngineView:
        """This rank's tensors, with edits adopted and the last step's verdict acted on. Collective."""
        trainables = self._trainables
        trainables.check_parameters()
        self._outcome.act_on_verdict()
        trainables.adopt_edits()
        layout = trainables.layout
        return EngineView(
            self.module, layout.units, layout.runs, self.optimizer, trainables.frozen_states, trainables.averages,
            trainables.groups, self.comm,
        )  # fmt: skip

    def checkpoint_counters(self) -> dict[str, int]:
        """Counts at the start of the current window."""
        self._outcome.read()
        progress, averaged = self._engine.progress, self._trainables.averages.exist(self._trainables.layout.units)
        return {
            "global_steps": progress.global_steps,
            "micro_steps": progress.micro_steps - self._window.steps,
            "global_samples": progress.global_samples,
            "skipped_steps": progress.skipped_steps,
            "average_updates": progress.average_updates if averaged else 0,
        }

    def in_window(self) -> bool:
        """Whether the current window has begun."""
        return self._window.is_open

    def lay_out_by_state_steps(self, steps: Mapping[str, int]) -> None:
        """Lay the model out so that only parameters whose state has seen as many steps share a run. Collective."""
        self._outcome.act_on_verdict()
        self._trainables.lay_out_by_state_steps(steps)

    def go_on_from(self, counters: Mapping[str, int]) -> None:
        """Begin a new window; the counters in ``counters`` become what they are there."""
        self._backwards.discard()
        self._outcome.forget()
        for name, count in counters.items():
            setattr(self._engine.progress, name, count)
        self._batches.end_micro_step()
        self.window_start.begin(self._batches.position)
