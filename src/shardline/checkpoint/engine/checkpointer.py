"""Saving and loading for one engine: what belongs into a checkpoint, in which order it goes back, in which thread."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from shardline._version import __version__
from shardline.checkpoint.engine.background import BackgroundSave
from shardline.checkpoint.engine.capture import (
    Captured,
    capture_buffers,
    capture_tensors,
    checksums,
    merge,
    optimizer_record,
)
from shardline.checkpoint.engine.export import SHARD_BYTES, export_model
from shardline.checkpoint.engine.extra import capture_extra, load_extra
from shardline.checkpoint.engine.groups import Groups, match_groups, scheduler_state
from shardline.checkpoint.engine.leaving import Leaving
from shardline.checkpoint.engine.parts import Parts, optimizer_name
from shardline.checkpoint.engine.randomness import RandomState, derive_states
from shardline.checkpoint.engine.restore import (
    Match,
    ages,
    check_states,
    load_buffers,
    load_optimizer,
    load_weights,
    match,
    settle_weights,
)
from shardline.checkpoint.engine.staging import Staging
from shardline.checkpoint.engine.window import WindowStart, persistent_buffers
from shardline.checkpoint.format.commit import Content, commit, together
from shardline.checkpoint.format.directory import Directory, Lock, check_files
from shardline.checkpoint.format.faults import armed
from shardline.checkpoint.format.files import shown
from shardline.checkpoint.format.manifest import Manifest, check_tag, read_manifest
from shardline.checkpoint.format.reader import Reader
from shardline.checkpoint.format.values import encode, name_of
from shardline.comm import Comm, Exchange, check_alike
from shardline.config import Config
from shardline.data import Loader
from shardline.errors import CheckpointError, UsageError, text_of
from shardline.events import Events, Notice
from shardline.optim import lr
from shardline.runtime.topology import fault
from shardline.sharding.precision import LossScaler

__all__ = ["Checkpointer", "Trainer"]


class Trainer(Protocol):
    """What saving and loading need of an engine."""

    module: nn.Module
    optimizer: Optimizer | None
    config: Config
    comm: Comm
    events: Events
    scaler: LossScaler
    client_state: dict[str, Any]
    window_start: WindowStart

    @property
    def lr_scheduler(self) -> Any:
        """The scheduler that the engine steps, or None."""
        ...

    @property
    def training_dataloader(self) -> Loader | None:
        """The engine's own loader, or None."""
        ...

    @property
    def global_steps(self) -> int:
        """Steps so far. Asking waits for nothing."""
        ...

    def checkpoint_parts(self) -> Parts:
        """The engine's tensors, with edits adopted and the last step's verdict read."""
        ...

    def checkpoint_counters(self) -> dict[str, int]:
        """Steps, micro-steps and samples at the start of the current window."""
        ...

    def in_window(self) -> bool:
        """Whether micro-steps were done that no step has applied."""
        ...

    def lay_out_by_age(self, ages: Mapping[str, int]) -> None:
        """Lay the model out so that only parameters of one age share a run. Collective."""
        ...

    def go_on_from(self, counters: Mapping[str, int] | None) -> None:
        """Forget the current window and count from here on."""
        ...


class Checkpointer:
    """Saves and loads one engine. Every method is collective."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._locks: dict[str, Lock] = {}
        self._channel: Exchange | None = None
        self._running: BackgroundSave | None = None
        self._staging = Staging()
        self.leaving = Leaving()
        if trainer.config.checkpoint.save_on_sigterm:
            self.leaving.listen()

    # -- saving -----------------------------------------------------------------------------------------------------

    def save(
        self,
        path: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        *,
        latest: bool = True,
        frozen: bool = True,
        background: bool = False,
    ) -> bool:
        """Write a checkpoint, or with ``background`` begin to."""
        trainer = self._trainer
        self.wait()
        counters = trainer.checkpoint_counters()
        name = check_tag(f"global_step{counters['global_steps']}" if tag is None else str(tag))
        found, content = self._collect(name, counters, client_state or {}, frozen=frozen)
        config = trainer.config.checkpoint
        ours = config.dir is not None and os.path.realpath(path) == os.path.realpath(config.dir)
        keep = config.keep if ours else None
        reach = armed(trainer.comm.data.rank, fault())

        def run(channel: Exchange) -> None:
            commit(path, name, content, channel, reach, latest=latest, keep=keep, hold=self._hold)

        if not background:
            run(trainer.comm.messages)
            return True
        if self._channel is None:
            self._channel = trainer.comm.channel()
        content.tensors, content.ready = self._staging.begin(found.tensors), self._staging.finish
        channel = self._channel
        self._running = BackgroundSave(lambda: run(channel), over=self._staging.give_up)
        return True

    def before_step(self) -> None:
        """Return when a step may change the optimizer's state, which a save in the background copies before."""
        self._staging.before_step()

    def after_step(self, *, leave: bool) -> None:
        """Save where the configuration says so, and end the process if that was asked for."""
        trainer = self._trainer
        config = trainer.config.checkpoint
        due = bool(config.every_steps) and trainer.global_steps % (config.every_steps or 1) == 0
        if config.dir is None or not (due or leave):
            return
        if leave:  # there is no later save that could hold this state
            try:
                self.wait()
            except CheckpointError as error:
                trainer.events.emit(Notice(str(error)))
        self.save(config.dir, client_state=trainer.client_state, background=config.async_save and not leave)
        if leave:
            self.close()
            trainer.events.emit(Notice(f"saved to {config.dir} and ended, as SIGTERM asked"))
            raise SystemExit(0)

    def resume(self) -> None:
        """Load what ``checkpoint.resume`` names: "auto" is the newest whole one, if there is any."""
        trainer = self._trainer
        config = trainer.config.checkpoint
        if config.dir is None or config.resume is None:
            return
        path, state = self.load(config.dir, None if config.resume == "auto" else config.resume)
        if path is not None and state is not None:
            trainer.client_state = state
            trainer.events.emit(Notice(f"resumed from {path}, step {trainer.checkpoint_counters()['global_steps']}"))

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            CheckpointError: if the last save in the background failed.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait, and let go of locks, process groups and signals."""
        self.leaving.stop()
        try:
            self.wait()
        finally:
            if self._channel is not None:
                self._channel.close()
                self._channel = None
            self._locks.clear()
            self._staging.clear()

    def _hold(self, lock: Lock) -> None:
        self._locks[str(id(lock))] = lock

    def _collect(
        self, tag: str, counters: dict[str, int], client_state: Mapping[str, Any], *, frozen: bool
    ) -> tuple[Captured, Content]:
        trainer = self._trainer
        parts = trainer.checkpoint_parts()
        comm, within = parts.comm, trainer.in_window()
        start = trainer.window_start

        buffers = start.buffers() if within else {name: b.detach() for name, b in persistent_buffers(parts.module)}
        found, common = Captured(), dict[str, Any]()

        def collect() -> dict[str, Any]:
            """What may fail on one rank: values that cannot be saved. What ranks compare."""
            capture_tensors(found, parts, frozen=frozen)
            tensors: dict[str, Tensor] = {}
            extra = capture_extra(parts.module, tensors)  # on every rank: it may be collective
            if comm.data.rank == 0:
                found.tensors.update(tensors)
                common.update(self._common(parts, counters, client_state, found, within=within), extra_state=extra)
            return {"tag": tag, "buffers": checksums(buffers)}

        everyone = together(comm.messages, "collecting the checkpoint", collect)
        check_alike([{"the tag of the checkpoint": theirs["tag"]} for theirs in everyone])
        writers = capture_buffers(found, buffers, [theirs["buffers"] for theirs in everyone], comm.data.rank)
        random = start.random if within and start.random is not None else RandomState.now(comm.device)
        tensors, values = random.to_tensors()
        found.tensors.update(tensors)

        def manifest(reports: list[dict[str, Any]]) -> dict[str, Any]:
            return {
                **common,
                "parameters": merge(parts, reports, frozen=frozen),
                "buffers": {
                    name: {"shape": list(buffer.shape), "dtype": name_of(buffer.dtype), "files": writers[name]}
                    for name, buffer in buffers.items()
                },
                "random": [report["random"] for report in reports],
            }

        return found, Content(found.tensors, found.report() | {"random": values}, manifest)

    def _common(
        self,
        parts: Parts,
        counters: dict[str, int],
        client_state: Mapping[str, Any],
        found: Captured,
        *,
        within: bool,
    ) -> dict[str, Any]:
        """What rank 0 says for all."""
        trainer = self._trainer
        scheduler, loader = trainer.lr_scheduler, trainer.training_dataloader
        tensors: dict[str, Tensor] = {}
        if not isinstance(client_state, Mapping):
            raise UsageError(f"client_state is a {type(client_state).__name__}; it must be a dict.")
        common = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "shardline": __version__,
            "torch": torch.__version__,
            "world_size": parts.comm.data.size,
            "stage": trainer.config.zero_optimization.stage,
            "counters": counters,
            "optimizer": optimizer_record(parts, tensors),
            "scheduler": None if scheduler is None else encode(scheduler.state_dict(), "scheduler", tensors),
            "scaler": trainer.scaler.state_dict() if trainer.scaler.dynamic else None,
            "loader": None if loader is None else _loader_state(loader, trainer.window_start, within=within),
            "seed": trainer.config.seed,
            "config": trainer.config.to_dict(),
            "client_state": encode(dict(client_state), "client_state", tensors),
        }
        found.tensors.update(tensors)
        return common

    def export(
        self,
        path: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        *,
        frozen: bool = True,
        stem: str = "model",
        shard_bytes: int = SHARD_BYTES,
    ) -> list[str]:
        """Write the whole model in Hugging Face's layout; returns the files."""
        parts = self._trainer.checkpoint_parts()
        files = export_model(parts, path, dtype, frozen=frozen, stem=stem, shard_bytes=shard_bytes)
        return [str(file) for file in files]

    # -- loading ----------------------------------------------------------------------------------------------------

    def load(
        self,
        path: str | os.PathLike[str],
        tag: str | None = None,
        *,
        strict: bool = True,
        optimizer: bool = True,
        scheduler: bool = True,
        position: bool = True,
        weights_only: bool = False,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Read a checkpoint: the one ``tag`` names, else the newest whole one."""
        trainer = self._trainer
        self.wait()
        chosen = self._choose(Directory(path), tag)
        if chosen is None:
            return None, None
        reader, passed_over = chosen
        try:
            client_state = self._apply(
                reader,
                strict=strict,
                optimizer=optimizer and not weights_only,
                scheduler=scheduler and not weights_only,
                position=position and not weights_only,
                counters=not weights_only,
            )
        finally:
            reader.close()
        for reason in passed_over:
            trainer.events.emit(Notice(f"loaded {reader.path} and not a later checkpoint: {reason}"))
        return str(reader.path), client_state

    def _choose(self, directory: Directory, tag: str | None) -> tuple[Reader, list[str]] | None:
        """The checkpoint to load, verified by all ranks together, and why others were passed over."""
        comm = self._trainer.comm
        if tag is not None:
            check_tag(tag)

        def look() -> tuple[list[str], str | None, str | None] | None:
            if comm.data.rank > 0 or tag is not None:
                return None if tag is None else ([tag], None, None)
            order = directory.order()
            return order, directory.complaint(), None if order else directory.lack()

        order, complaint, lack = together(comm.messages, f"looking for checkpoints in {directory.path}", look)[0]
        passed_over: list[str] = [] if complaint is None else [complaint]
        for each in order:
            path, manifest, mine = self._verify(directory, each)
            everyone = comm.messages.exchange([None if manifest is None else manifest.id, mine])
            problems = [f"{text}" for _, theirs in everyone for text in theirs]
            if len({identity for identity, _ in everyone}) > 1 and not problems:
                problems = [f"{directory.path / each} is not the same checkpoint on all ranks"]
            if not problems and manifest is not None and path is not None:
                return Reader(path, manifest), passed_over
            passed_over.append("; ".join(dict.fromkeys(problems)))
        if not order:
            self._trainer.events.emit(Notice(f"no checkpoint was loaded: {'; '.join([str(lack), *passed_over])}"))
            return None
        what = f"the checkpoint {directory.path / tag} cannot be loaded" if tag is not None else (
            f"no checkpoint in {directory.path} is whole"
        )  # fmt: skip
        there = f" There are: {', '.join(directory.tags()) or 'none'}." if tag is not None else ""
        raise CheckpointError(f"{what}: {'; '.join(passed_over)}.{there}")

    def _verify(self, directory: Directory, tag: str) -> tuple[Path | None, Manifest | None, list[str]]:
        """Where it is, the manifest, and what is wrong with it and with this rank's part of the files."""
        comm = self._trainer.comm
        try:
            path = directory.locate(tag)
            if path is None:
                return None, None, [f"there is no {directory.path / tag}"]
            manifest = read_manifest(path)
        except (CheckpointError, OSError) as error:
            return None, None, [text_of(error).removesuffix(".")]
        return path, manifest, check_files(path, manifest, range(comm.data.rank, len(manifest.files), comm.data.size))

    def _apply(
        self, reader: Reader, *, strict: bool, optimizer: bool, scheduler: bool, position: bool, counters: bool
    ) -> dict[str, Any]:
        trainer, manifest = self._trainer, reader.manifest
        parts = trainer.checkpoint_parts()
        found = match(parts, reader, strict=strict)
        # Everything that can be refused is, before anything changes.
        kind = None if manifest.optimizer is None else manifest.optimizer.kind
        same_kind = parts.optimizer is not None and kind == optimizer_name(parts.optimizer)
        if optimizer and same_kind:
            check_states(reader)
        groups = match_groups(parts, reader) if same_kind else Groups()
        scheduler = scheduler and (not optimizer or same_kind or parts.optimizer is None)
        schedule = self._schedule(reader, parts, groups, found) if scheduler else None
        client_state = _values(reader, "client_state", manifest.client_state)
        extra = {path: reader.value(value) for path, value in manifest.extra_state.items()}
        random = self._random(reader) if counters else None
        if position and trainer.training_dataloader is not None and manifest.loader is not None:
            trainer.training_dataloader.load_state_dict(manifest.loader)
        elif position and trainer.training_dataloader is not None:
            found.notes.append("it holds no position in the data, so the loader stays where it is")
        if optimizer and same_kind:
            by_age = ages(parts, reader, found)
            if by_age is not None:
                trainer.lay_out_by_age(by_age)
                parts = trainer.checkpoint_parts()

        def read() -> str | None:
            load_weights(parts, reader, found)
            load_buffers(parts, reader, found)
            load_extra(parts.module, extra)
            return load_optimizer(parts, reader, found, groups) if optimizer else None

        try:
            weights_only = together(parts.comm.messages, f"reading the checkpoint {reader.path}", read)[0]
        except CheckpointError as error:
            raise CheckpointError(
                f"{text_of(error)} The model may hold a part of it now: load a whole one, or end."
            ) from error
        settle_weights(parts)
        found.notes += [weights_only] if weights_only is not None else groups.notes if optimizer else []
        if schedule is not None:
            _restore_schedule(trainer.lr_scheduler, schedule, reader)
        if counters and manifest.scaler is not None and trainer.scaler.dynamic:
            trainer.scaler.load_state_dict(manifest.scaler.model_dump())
        if counters and random is None:
            derive_states(manifest.seed, manifest.counters.global_steps, parts.comm.data.rank)
        elif random is not None:
            random.restore(parts.comm.device)
        trainer.go_on_from(manifest.counters.model_dump() if counters else None)
        for note in found.notes:
            trainer.events.emit(Notice(f"{reader.path}: {note}"))
        return client_state

    def _schedule(self, reader: Reader, parts: Parts, groups: Groups, found: Match) -> dict[str, Any] | None:
        """The state of the schedule in the order of this optimizer's param groups."""
        scheduler, state = self._trainer.lr_scheduler, reader.manifest.scheduler
        if scheduler is None or state is None:
            return None
        if not groups.sources:  # another optimizer, whose state is not loaded: nothing to match by
            count = 0 if parts.optimizer is None else len(parts.optimizer.param_groups)
            groups = Groups(list(range(count)), count)
        elif not groups.in_order and not isinstance(scheduler, LRScheduler):
            found.notes.append(
                f"param groups are in another order here than in the checkpoint; the state of "
                f"{type(scheduler).__name__} is restored as it is"
            )
        return scheduler_state(scheduler, _values(reader, "scheduler", state), groups)

    def _random(self, reader: Reader) -> RandomState | None:
        """This rank's random states, or ``None`` where they are derived."""
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


def _values(reader: Reader, what: str, value: Any) -> dict[str, Any]:
    decoded = reader.value(value)
    if not isinstance(decoded, dict):
        raise CheckpointError(f"{reader.path} holds a {what} that is no dict.")
    return decoded


def _restore_schedule(scheduler: Any, state: dict[str, Any], reader: Reader) -> None:
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


def _loader_state(loader: Loader, start: WindowStart, *, within: bool) -> dict[str, Any]:
    return loader.state_dict(at=start.position) if within else loader.state_dict()
