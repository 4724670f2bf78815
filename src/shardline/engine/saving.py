"""The engine's methods to save, load and export; :mod:`shardline.checkpoint` does it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from shardline.checkpoint.engine.checkpointer import Checkpointer, Scope
from shardline.checkpoint.foreign.huggingface import export_model
from shardline.comm import Comm
from shardline.config import Config
from shardline.engine.collective import collective
from shardline.engine.trainables import Trainables
from shardline.errors import UsageError
from shardline.runtime.modes import outside_modes
from shardline.sharding.precision import Precision

__all__ = ["Saving"]

L = TypeVar("L")


class Saving:
    """The methods of an engine that write and read files.

    Attributes:
        checkpoints: saves and loads.
        client_state: the user's own values, which saves take along unless they are given others.
    """

    config: Config
    comm: Comm
    precision: Precision
    trainables: Trainables
    checkpoints: Checkpointer
    client_state: dict[str, Any]

    def register_loader(self, loader: L, name: str = "loader") -> L:
        """Save and load the position of a loader of yours with each checkpoint, as that of the engine's own.

        Call it on every rank, before the first batch is drawn. After a resume the loader goes to its position here.
        A checkpoint holds the state from the end of the last step, so draw the batches of a step after the one before.

        Args:
            loader: has ``state_dict()``, of plain values and tensors, and ``load_state_dict(state)``, such as
                torchdata's ``StatefulDataLoader``. Each rank's state is saved; at another number of ranks it is loaded
                where all ranks had the same.
            name: of this loader among several.

        Returns:
            The loader.

        Raises:
            UsageError: if it has no such methods, or another loader has the name.
            CheckpointError: if it does not take the position of the checkpoint that was loaded.
        """
        self.checkpoints.register(name, loader)
        return loader

    @outside_modes
    @collective
    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        *,
        async_save: bool | None = None,
    ) -> bool:
        """Save everything that a resume needs to ``save_dir/tag``. Collective: every rank calls it alike.

        Inside an accumulation window it holds the start of the window, and a resume replays it.

        Args:
            save_dir: a directory that all ranks share.
            tag: name of the checkpoint; ``global_step<n>`` if left out. One of the same name is replaced.
            client_state: the user's own values (plain ones and tensors), given back by :meth:`load_checkpoint`;
                rank 0's are kept.
            save_latest: whether a load without a tag may take it.
            exclude_frozen_parameters: leave out the weights of frozen parameters.
            async_save: go on training while it is written; the configuration's ``checkpoint.async`` if left out. An
                error is raised by the next call that saves, loads or destroys.

        Returns:
            True.

        Raises:
            CheckpointError: on every rank, if any could not write. Nothing has changed then, and training can go on.
            DisagreementError: if ranks gave different tags.
        """
        self.trainables.averages.check_hidden("save_checkpoint()")
        background = self.config.checkpoint.async_save if async_save is None else async_save
        self.checkpoints.save(
            save_dir,
            tag,
            self.client_state if client_state is None else client_state,
            latest=save_latest,
            frozen=not exclude_frozen_parameters,
            background=background,
        )
        return True

    @outside_modes
    @collective
    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: None = None,
        *,
        load_data_position: bool = True,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load a checkpoint that any stage, precision and number of ranks has saved. Collective. Runs no code from it.

        Args:
            load_dir: the directory given to :meth:`save_checkpoint`.
            tag: which one; the newest intact one if left out, and a notice says why not a later one.
            load_module_strict: names of parameters and buffers must be the same. If false, each that only one side has
                is named in a notice, and the rest is loaded.
            load_optimizer_states: and its param groups' options.
            load_lr_scheduler_states: the schedule's position.
            load_module_only: weights and buffers only; no counters, random states or position of the loader either.
            custom_load_fn: not supported.
            load_data_position: the position of the engine's loader, and of those that were registered.

        Returns:
            ``(path, client_state)``, or ``(None, None)`` where there is no checkpoint.

        Raises:
            CheckpointError: if the one that ``tag`` names, or every one that there is, is damaged or does not fit.
            DataError: if the loader's position does not fit this dataset; nothing was loaded then.
        """
        if custom_load_fn is not None:
            raise UsageError("custom_load_fn is not supported. Load weights inside gathered_parameters(write=True).")
        self.trainables.averages.check_hidden("load_checkpoint()")
        self.trainables.bring_states()
        path, state = self.checkpoints.load(
            load_dir,
            None if tag is None else str(tag),
            Scope(
                strict=load_module_strict,
                optimizer=load_optimizer_states and not load_module_only,
                scheduler=load_lr_scheduler_states and not load_module_only,
                position=load_data_position and not load_module_only,
                counters=not load_module_only,
            ),
        )
        self.client_state = self.client_state if state is None else state
        return path, state

    @outside_modes
    @collective
    def export(
        self,
        save_dir: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        exclude_frozen_parameters: bool = False,
        max_shard_bytes: int = 5_000_000_000,
    ) -> list[str]:
        """Write the whole model in Hugging Face's layout: safetensors files and their index. Collective.

        One unit at a time is whole in memory. Tied parameters are written once.

        Args:
            save_dir: a directory of rank 0.
            dtype: of floating weights; ``None`` leaves that of the masters, fp32 where there are any.
            exclude_frozen_parameters: leave out frozen parameters.
            max_shard_bytes: a file holds no more, unless a single tensor is larger.

        Returns:
            The files that were written.

        Raises:
            CheckpointError: on every rank, if rank 0 could not write.
        """
        engine, frozen = self.checkpoints.view(), not exclude_frozen_parameters
        return [str(file) for file in export_model(engine, save_dir, dtype, frozen=frozen, shard_bytes=max_shard_bytes)]

    @outside_modes
    @collective
    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "model.safetensors",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the whole model in its compute dtype, as :meth:`export` does: safetensors whatever the name says."""
        stem = os.path.splitext(save_filename)[0]
        stem = "model" if stem == "pytorch_model" else stem  # the name that goes with safetensors
        engine, frozen = self.checkpoints.view(), not exclude_frozen_parameters
        export_model(engine, save_dir, self.precision.compute, frozen=frozen, stem=stem)
        return True

    save_fp16_model = save_16bit_model
