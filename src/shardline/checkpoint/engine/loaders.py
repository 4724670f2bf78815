"""Positions of loaders that the user brings: anything with ``state_dict`` and ``load_state_dict``."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shardline.checkpoint.format.manifest import check_tensors
from shardline.checkpoint.format.reader import CheckpointReader
from shardline.checkpoint.format.tensorfile import memory_of
from shardline.checkpoint.format.values import decode, encode
from shardline.errors import CheckpointError, UsageError, shown, text_of
from shardline.runtime.modes import outside_modes

__all__ = ["Loaders"]

_KEY = "loaders"
"""The tensor of each rank's file that holds what its loaders said, as the bytes of a JSON text."""


class Loaders:
    """The user's loaders by name, each with its state where the current window began.

    A save holds those states, so that a resume draws the batches of the window again.
    """

    def __init__(self) -> None:
        self._loaders: dict[str, Any] = {}
        self._begun: dict[str, Any] = {}
        self._loaded: dict[str, Any] | None = None

    @property
    def names(self) -> list[str]:
        return sorted(self._loaders)

    def add(self, name: str, loader: Any) -> str | None:
        """Keep the position of ``loader``, and go to the one of the checkpoint that was loaded before, if any was.

        Returns:
            What to tell the user: that this checkpoint holds no position of it.

        Raises:
            UsageError: it has no position to keep, or another has the name.
            CheckpointError: it does not take the position.
        """
        kind = type(loader).__name__
        if not all(callable(getattr(loader, method, None)) for method in ("state_dict", "load_state_dict")):
            raise UsageError(
                f"The loader {name!r} is a {kind}, which has no state_dict() and load_state_dict(), so its position "
                f"cannot be kept. Use torchdata's StatefulDataLoader, or give initialize the dataset as training_data."
            )
        if self._loaders.get(name, loader) is not loader:
            raise UsageError(
                f"There is a loader {name!r} already; give each a name: register_loader(loader, name=...)."
            )
        self._loaders[name] = loader
        told = None
        if self._loaded is not None:
            told = self._restore({name: self._loaded[name]} if name in self._loaded else {}, [name])
        self.begin_window()
        return told

    def begin_window(self) -> None:
        """The next batch that each loader yields is the first of a window."""
        if self._loaders:
            self._begun = {name: copy.deepcopy(loader.state_dict()) for name, loader in self._loaders.items()}

    @outside_modes
    def to_tensors(self) -> dict[str, Tensor]:
        """What this rank's file holds of them.

        Raises:
            CheckpointError: for a state that a checkpoint cannot hold.
        """
        if not self._loaders:
            return {}
        tensors: dict[str, Tensor] = {}
        states = {name: encode(state, f"{_KEY}[{name!r}]", tensors) for name, state in self._begun.items()}
        text = bytearray(json.dumps(states).encode())
        return tensors | {_KEY: torch.frombuffer(text, dtype=torch.uint8)}

    def read(self, reader: CheckpointReader, rank: int, size: int) -> dict[str, Any]:
        """The states in a checkpoint for ``rank`` of ``size`` ranks, by the loader's name.

        Raises:
            CheckpointError: what is saved there is damaged, or was saved on another number of ranks, each of which had
                a position of its own.
        """
        world_size = reader.manifest.world_size
        if not reader.manifest.loaders:
            return {}
        if world_size == size:
            return _read(reader, rank)
        if len({_bytes(reader, each) for each in range(world_size)}) > 1:
            raise CheckpointError(
                f"{shown(reader.path)} holds positions of the loaders {shown(reader.manifest.loaders)} on {world_size} "
                f"ranks, each of which had its own; the number of ranks is {size} now. Give initialize the dataset as "
                f"training_data, whose position goes on at any number of ranks, or load_checkpoint() with "
                f"load_data_position=False."
            )
        return _read(reader, 0)

    def restore(self, states: Mapping[str, Any]) -> list[str]:
        """Go to ``states``; loaders that are registered later go there then. Returns what to tell the user.

        Raises:
            CheckpointError: a loader does not take its state.
        """
        self._loaded = dict(states)
        told = self._restore({name: states[name] for name in self._loaders if name in states}, self.names)
        return [] if told is None else [told]

    def _restore(self, states: Mapping[str, Any], wanted: list[str]) -> str | None:
        for name, state in states.items():
            try:
                self._loaders[name].load_state_dict(state)
            except Exception as error:
                raise CheckpointError(
                    f"The loader {name!r} ({type(self._loaders[name]).__name__}) does not take the position that the "
                    f"checkpoint holds ({type(error).__name__}: {shown(text_of(error))}). load_checkpoint() with "
                    f"load_data_position=False leaves it where it is."
                ) from error
        missing = [name for name in wanted if name not in states]
        if not missing:
            return None
        return f"it holds no position of the loader {', '.join(map(repr, missing))}, which stays where it is"


def _bytes(reader: CheckpointReader, rank: int) -> bytes:
    """All that a rank saved of its loaders."""
    file = reader.file(rank)
    tensors = [file.tensor(key) for key in sorted(file.keys()) if key.startswith(_KEY)]
    return b"".join(bytes(memory_of(tensor)) for tensor in tensors)


def _read(reader: CheckpointReader, rank: int) -> dict[str, Any]:
    """The states that a rank saved."""
    file = reader.file(rank)
    text = file.tensor(_KEY)
    try:
        states = json.loads(bytes(memory_of(text)))
        check_tensors([states])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the positions of loaders in {shown(file.path)} are malformed ({shown(error)})."
        ) from None
    if not isinstance(states, dict):
        raise CheckpointError(f"the positions of loaders in {shown(file.path)} are malformed.")
    return {name: decode(state, file.tensor) for name, state in states.items()}
