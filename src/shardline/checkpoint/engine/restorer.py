"""Loads a checkpoint into one engine: everything is checked first, then everything is changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from shardline.checkpoint.engine.extra import load_extra
from shardline.checkpoint.engine.groups import Groups, match_groups, scheduler_state
from shardline.checkpoint.engine.randomness import RandomState, derive_states
from shardline.checkpoint.engine.restore import (
    Match,
    finish_load,
    load_averages,
    load_buffers,
    load_optimizer,
    load_weights,
    match,
    steps_to_lay_out,
)
from shardline.checkpoint.engine.selection import select
from shardline.checkpoint.engine.states import check_states
from shardline.checkpoint.engine.trainer import Trainer
from shardline.checkpoint.engine.view import EngineView, optimizer_name
from shardline.checkpoint.format.commit import together
from shardline.checkpoint.format.directory import Directory
from shardline.checkpoint.format.reader import CheckpointReader
from shardline.errors import CheckpointError, shown, text_of
from shardline.events import CheckpointLoaded, Notice
from shardline.optim import lr

__all__ = ["Restorer", "Scope"]


@dataclass(frozen=True)
class Scope:
    """What is loaded in addition to weights, buffers and extra state.

    Attributes:
        strict: whether the names of checkpoint and model must be the same.
        optimizer: its state and options.
        scheduler: its state.
        position: that of the loader.
        counters: counters, loss scale and random states.
    """

    strict: bool = True
    optimizer: bool = True
    scheduler: bool = True
    position: bool = True
    counters: bool = True


@dataclass
class _Prepared:
    """What was read and checked of a checkpoint before anything is changed.

    Attributes:
        steps: steps by parameter, if the model must be laid out by them.
        random: ``None`` where random states are derived.
    """

    found: Match
    groups: Groups
    steps: dict[str, int] | None
    schedule: dict[str, Any] | None
    client_state: dict[str, Any]
    extra: Mapping[str, Any]
    random: RandomState | None


class Restorer:
    """Loads checkpoints into one engine."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def load(
        self, path: str | os.PathLike[str], tag: str | None, scope: Scope
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load the checkpoint that ``tag`` names, else the newest intact one. Collective.

        Returns:
            Its path and the user's values, or ``(None, None)`` where there is no checkpoint.

        Raises:
            CheckpointError: if it is damaged or does not fit; if only reading it fails, weights may be changed by then.
            DataError: if the loader's position does not fit; nothing is changed then.
        """
        events = self._trainer.events
        reader, reasons = select(Directory(path), tag, self._trainer.comm)
        if reader is None:
            events.emit(Notice(f"no checkpoint was loaded: {'; '.join(reasons)}"))
            return None, None
        try:
            prepared = self._prepare(reader, scope)
            self._apply(reader, prepared, scope)
        finally:
            reader.close()
        for note in prepared.found.notes:
            events.emit(Notice(f"{reader.path}: {note}"))
        for reason in reasons:
            events.emit(Notice(f"loaded {reader.path} and not a later checkpoint: {reason}"))
        return str(reader.path), prepared.client_state

    def _prepare(self, reader: CheckpointReader, scope: Scope) -> _Prepared:
        trainer, manifest = self._trainer, reader.manifest
        engine = trainer.checkpoint_view()
        found = match(engine, reader, strict=scope.strict)
        kind = None if manifest.optimizer is None else manifest.optimizer.kind
        same_kind = engine.optimizer is not None and kind == optimizer_name(engine.optimizer)
        groups = match_groups(engine, reader) if same_kind else Groups()
        if scope.optimizer and same_kind:
            check_states(engine, reader, found, groups)
        scheduler = scope.scheduler and (not scope.optimizer or same_kind or engine.optimizer is None)
        prepared = _Prepared(
            found,
            groups,
            schedule=self._schedule(reader, engine, groups, found) if scheduler else None,
            client_state=_values(reader, "client_state", manifest.client_state),
            extra={path: reader.value(value) for path, value in manifest.extra_state.items()},
            random=self._random(reader) if scope.counters else None,
            steps=steps_to_lay_out(engine, reader, found) if scope.optimizer and same_kind else None,
        )
        loader = trainer.training_dataloader
        if scope.position:
            found.notes += self._move_loaders(reader)
        if scope.position and loader is not None:  # last: it checks the position and moves there
            if manifest.loader is not None:
                loader.load_state_dict(manifest.loader)
            else:
                found.notes.append("it holds no position in the data, so the loader stays where it is")
        return prepared

    def _apply(self, reader: CheckpointReader, prepared: _Prepared, scope: Scope) -> None:
        trainer, manifest, found = self._trainer, reader.manifest, prepared.found
        if prepared.steps is not None:
            trainer.lay_out_by_state_steps(prepared.steps)
        engine = trainer.checkpoint_view()

        def read() -> str | None:
            load_weights(engine, reader, found)
            load_averages(engine, reader, found, wanted=scope.counters)
            load_buffers(engine, reader, found)
            load_extra(engine.module, prepared.extra)
            return load_optimizer(engine, reader, found, prepared.groups) if scope.optimizer else None

        try:
            weights_only = together(engine.comm.messages, f"reading the checkpoint {reader.path}", read)[0]
        except CheckpointError as error:
            raise CheckpointError(
                f"{text_of(error)} The model may hold a part of it now: load an intact one, or end."
            ) from error
        finish_load(engine)
        found.notes += [weights_only] if weights_only is not None else prepared.groups.notes if scope.optimizer else []
        if prepared.schedule is not None:
            _restore_schedule(trainer.lr_scheduler, prepared.schedule, reader)
        if scope.counters:
            self._restore_counters(reader, prepared.random)
        trainer.go_on_from(manifest.counters.model_dump() if scope.counters else {"average_updates": 0})
        if scope.counters:
            trainer.events.emit(CheckpointLoaded(manifest.counters.global_steps, str(reader.path), manifest.sinks))

    def _restore_counters(self, reader: CheckpointReader, random: RandomState | None) -> None:
        """Loss scale and random states; the latter are derived where there are none for this rank."""
        trainer, manifest = self._trainer, reader.manifest
        if manifest.scaler is not None and trainer.scaler.dynamic:
            trainer.scaler.load_state_dict(manifest.scaler.model_dump())
        if random is None:
            derive_states(manifest.seed, manifest.counters.global_steps, trainer.comm.data.rank)
        else:
            random.restore(trainer.comm.device)

    def _schedule(
        self, reader: CheckpointReader, engine: EngineView, groups: Groups, found: Match
    ) -> dict[str, Any] | None:
        """The state of the schedule in the order of this optimizer's param groups."""
        scheduler, state = self._trainer.lr_scheduler, reader.manifest.scheduler
        if scheduler is None or state is None:
            return None
        if not groups.sources:  # another optimizer, whose state is not loaded: nothing to match by
            count = 0 if engine.optimizer is None else len(engine.optimizer.param_groups)
            groups = Groups(list(range(count)), count)
        elif not groups.in_order and not isinstance(scheduler, LRScheduler):
            found.notes.append(
                f"param groups are in another order here than in the checkpoint; the state of "
                f"{type(scheduler).__name__} is restored as it is"
            )
        return scheduler_state(scheduler, _values(reader, "scheduler", state), groups)

    def _move_loaders(self, reader: CheckpointReader) -> list[str]:
        """Let the loaders that the user brings go to their positions; returns what to tell. Collective."""
        trainer, told = self._trainer, list[str]()
        loaders, data = trainer.window_start.loaders, trainer.comm.data

        def move() -> None:
            told.extend(loaders.restore(loaders.read(reader, data.rank, data.size)))

        together(trainer.comm.messages, f"moving the loaders to their positions in {reader.path}", move)
        return told

    def _random(self, reader: CheckpointReader) -> RandomState | None:
        """This rank's random states, or ``None`` where they are derived. Collective."""
        comm, manifest = self._trainer.comm, reader.manifest
        if len(manifest.random) != comm.data.size:
            return None
        states: list[RandomState] = []

        def look() -> None:
            file = reader.file(comm.data.rank)
            tensors = {key: file.tensor(key) for key in file.keys() if key.startswith("random/")}  # noqa: SIM118
            states.append(RandomState.from_tensors(tensors, manifest.random[comm.data.rank]))

        together(comm.messages, f"reading the random states of {reader.path}", look)
        return states[0]


def _values(reader: CheckpointReader, what: str, value: Any) -> dict[str, Any]:
    decoded = reader.value(value)
    if not isinstance(decoded, dict):
        raise CheckpointError(f"{reader.path} holds a {what} that is not a dict.")
    return decoded


def _restore_schedule(scheduler: Any, state: dict[str, Any], reader: CheckpointReader) -> None:
    try:
        if isinstance(scheduler, LRScheduler):
            lr.restore(scheduler, state)
        else:
            scheduler.load_state_dict(state)
    except Exception as error:
        raise CheckpointError(
            f"{reader.path}: {type(scheduler).__name__} does not take the state of the schedule "
            f"({type(error).__name__}: {shown(error)}). The weights are loaded already; pass "
            f"load_lr_scheduler_states=False to leave it out."
        ) from error
