"""Checkpoints of one engine: on demand, and automatically as configured."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from shardline.checkpoint.engine.restorer import Restorer, Scope
from shardline.checkpoint.engine.saver import Saver
from shardline.checkpoint.engine.termination import TerminationSignal
from shardline.checkpoint.engine.trainer import Trainer
from shardline.checkpoint.engine.view import EngineView
from shardline.errors import CheckpointError
from shardline.events import Notice
from shardline.runtime.ending import GO_ON

__all__ = ["Checkpointer", "Scope", "Trainer"]


class Checkpointer:
    """Saves and loads one engine. Every method is collective."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._saver, self._restorer = Saver(trainer), Restorer(trainer)
        self._termination = TerminationSignal()
        if trainer.config.checkpoint.save_on_sigterm:
            self._termination.listen()

    @property
    def exit_requested(self) -> bool:
        """Whether this process was asked to save and end."""
        return self._termination.received is not None

    def view(self) -> EngineView:
        """The engine's tensors as they are now, edits adopted."""
        return self._trainer.checkpoint_view()

    def register(self, name: str, loader: Any) -> None:
        """Keep the position of a loader of the user's: see :meth:`Loaders.add`."""
        if (told := self._trainer.window_start.loaders.add(name, loader)) is not None:
            self._trainer.events.emit(Notice(f"{self._trainer.config.checkpoint.dir}: {told}"))

    def save(
        self, path: str | os.PathLike[str], tag: str | None, client_state: Mapping[str, Any], **options: bool
    ) -> None:
        """Write a checkpoint: see :meth:`Saver.save`."""
        self._saver.save(path, tag, client_state, **options)

    def load(
        self, path: str | os.PathLike[str], tag: str | None, scope: Scope
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load a checkpoint: see :meth:`Restorer.load`."""
        self._saver.wait()
        return self._restorer.load(path, tag, scope)

    def resume(self) -> None:
        """Load what ``checkpoint.resume`` names: "auto" is the newest intact one, if there is any."""
        trainer = self._trainer
        config = trainer.config.checkpoint
        if config.dir is None or config.resume is None:
            return
        path, state = self.load(config.dir, None if config.resume == "auto" else config.resume, Scope())
        if path is not None and state is not None:
            trainer.client_state = state
            trainer.events.emit(Notice(f"resumed from {path}, step {trainer.checkpoint_counters()['global_steps']}"))

    def before_step(self) -> None:
        """Return when a step may change the optimizer's state."""
        self._saver.before_step()

    def after_step(self, *, leave: bool) -> None:
        """Save where the configuration says so; with ``leave``, end the process then.

        Raises:
            SystemExit: with ``leave``; its code is ``GO_ON``.
        """
        trainer = self._trainer
        config = trainer.config.checkpoint
        due = bool(config.every_steps) and trainer.global_steps % (config.every_steps or 1) == 0
        if config.dir is None or not (due or leave):
            return
        if leave:  # no later save could hold this state, so a failed one before must not prevent this one
            try:
                self.wait()
            except CheckpointError as error:
                trainer.events.emit(Notice(str(error)))
        self._saver.save(config.dir, client_state=trainer.client_state, background=config.async_save and not leave)
        if leave:
            self.close()
            asked = self._termination.received or "another rank"
            trainer.events.emit(
                Notice(
                    f"saved to {config.dir} and ended with exit code {GO_ON}, as {asked} asked: start again to go on"
                )
            )
            raise SystemExit(GO_ON)

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            CheckpointError: if the last save in the background failed.
        """
        self._saver.wait()

    def close(self) -> None:
        """Wait for the save that runs, and release locks, process groups and the signal handler."""
        self._termination.stop()
        self._saver.close()
