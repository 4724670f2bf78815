"""Saves one engine, at once or on a thread that writes while training goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from shardline.checkpoint.engine.background import BackgroundSave
from shardline.checkpoint.engine.collect import collect
from shardline.checkpoint.engine.staging import Staging
from shardline.checkpoint.engine.trainer import Trainer
from shardline.checkpoint.format.commit import commit
from shardline.checkpoint.format.faults import armed
from shardline.checkpoint.format.lock import Lock
from shardline.checkpoint.format.manifest import check_tag
from shardline.comm import Exchange
from shardline.events import CheckpointSaved
from shardline.runtime.environment import fault

__all__ = ["Saver"]


class Saver:
    """Saves one engine; one save at a time. Every method is collective."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._locks: set[Lock] = set()
        self._channel: Exchange | None = None
        self._running: BackgroundSave | None = None
        self._untold: tuple[BackgroundSave, int, str] | None = None  # written in the background, with step and path
        self._staging = Staging()

    def save(
        self,
        path: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        *,
        latest: bool = True,
        frozen: bool = True,
        background: bool = False,
    ) -> None:
        """Write a checkpoint; with ``background`` only begin to.

        Args:
            path: the directory of checkpoints.
            tag: the checkpoint's name; ``global_step<n>`` if left out.
            client_state: the user's values.
            latest: whether a load without a tag may take it.
            frozen: whether the weights of frozen parameters are saved.
            background: write on a thread, from copies that are made as training goes on.

        Raises:
            CheckpointError: on every rank, if any could not write, or the last save in the background has failed.
            DisagreementError: if ranks gave different tags.
        """
        trainer = self._trainer
        self.wait()
        counters = trainer.checkpoint_counters()
        name = check_tag(f"global_step{counters['global_steps']}" if tag is None else str(tag))
        content = collect(trainer, name, counters, client_state or {}, frozen=frozen)
        config = trainer.config.checkpoint
        configured = config.dir is not None and os.path.realpath(path) == os.path.realpath(config.dir)
        keep = config.keep if configured else None
        reach = armed(trainer.comm.data.rank, fault())

        def write(channel: Exchange) -> None:
            commit(path, name, content, channel, reach, latest=latest, keep=keep, hold=self._locks.add)

        step, begin, saved = counters["global_steps"], time.monotonic(), os.path.join(path, name)
        if not background:
            write(trainer.comm.messages)
            trainer.events.emit(CheckpointSaved(step, saved, time.monotonic() - begin))
            return
        if self._channel is None:
            self._channel = trainer.comm.channel()
        content.tensors, content.ready = self._staging.begin(content.tensors), self._staging.finish
        channel = self._channel
        self._running = BackgroundSave(lambda: write(channel), over=self._staging.give_up)
        self._untold = self._running, step, saved

    def before_step(self) -> None:
        """Return when a step may change the optimizer's state, which a save in the background copies before."""
        self._staging.before_step()
        self._tell()

    def _tell(self) -> None:
        """Say that a save in the background is over, the first time that it is seen."""
        if self._untold is not None and (seconds := self._untold[0].seconds) is not None:
            _, step, path = self._untold
            self._untold = None
            self._trainer.events.emit(CheckpointSaved(step, path, seconds))

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            CheckpointError: if the last save in the background failed.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()
            self._tell()

    def close(self) -> None:
        """Wait, then release locks, process group and memory."""
        try:
            self.wait()
        finally:
            if self._channel is not None:
                self._channel.close()
                self._channel = None
            self._locks.clear()
            self._staging.clear()
