"""Tracks the micro-batches of an engine: the weight of each, how many samples it holds, and the loader's position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardline.checkpoint.engine.window import WindowStart
from shardline.config import Config
from shardline.data import Loader
from shardline.data.short import ShortBatches
from shardline.data.split import Position
from shardline.engine.notices import Notices
from shardline.errors import UsageError
from shardline.sharding.window import Window

__all__ = ["BatchTracker"]


class BatchTracker:
    """The micro-batches of one engine.

    Attributes:
        loader: the engine's own; ``None`` if the user has one.
        position: of ``loader``, where the last micro-step ended.
    """

    def __init__(self, config: Config, window: Window, start: WindowStart, notices: Notices) -> None:
        self.loader: Loader | None = None
        self.position: Position | None = None
        self._window, self._start, self._notices = window, start, notices
        self._full = config.train_micro_batch_size_per_gpu
        self._by_samples = config.data_loader.weighting == "samples"
        self._short = ShortBatches(self._full)
        self._batch_fraction = 1.0
        self._handed_out: int | None = None  # samples that the loader has handed out since the last micro-step

    def attach(self, loader: Loader) -> None:
        """Count what ``loader`` hands out."""
        self.loader = loader
        self.end_micro_step()
        loader.on_batch = self._hand_out

    def close(self) -> None:
        """Close the loader, which is not counted any more."""
        if self.loader is not None:
            self.loader.close()
            self.loader.on_batch = None

    def _hand_out(self, position: Position) -> None:
        """The loader hands out a batch. If it is the first of a window, a resume begins here."""
        if self.loader is not None:
            self._handed_out = (self._handed_out or 0) + self.loader.samples
        if self._window.at_start:
            self._window.hand_out()
            self._start.mark(position)

    def note_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Count the tokens in the model's inputs, and the rows if the loader is the user's own."""
        if torch.is_grad_enabled():
            self._window.tokens += _tokens(args, kwargs)
            if self.loader is None:
                self._short.see(args, kwargs)

    def share(self) -> float:
        """The weight of this micro-step in full batches: 1.0, unless the loader has just handed out a smaller one."""
        loader = self.loader
        if loader is not None and loader.position != self.position:
            self._batch_fraction = loader.weight if self._by_samples else 1.0
        return self._batch_fraction

    @property
    def samples(self) -> int:
        """Samples of this micro-step: what the loader has handed out for it, or a full micro-batch."""
        return self._full if self._handed_out is None else self._handed_out

    def check_weight(self, weight: float | None) -> None:
        """Raise if the user gives a ``weight`` for a micro-step whose batch was weighted already."""
        if weight is not None and (share := self.share()) != 1.0:
            raise UsageError(
                f"step(weight=...) is for losses that are sums, but this batch of the loader holds {share:.3g} "
                f'of a full one and was weighted as a mean. Set "data_loader": {{"weighting": "none"}}.'
            )

    def warn_of_short_batch(self) -> None:
        """Emit a notice if a batch of the user's own loader seems smaller than those before."""
        if (samples := self._short.pop()) is not None:
            self._notices.once(
                f"a batch of {samples} samples counts as one of {self._full} like those before: only the engine's "
                f"own loader knows how much a batch holds. Give initialize the dataset as training_data, or make "
                f"losses sums and call engine.step(weight=samples)."
            )

    def end_micro_step(self) -> None:
        """The current micro-step was counted; the next batch belongs to the next one."""
        if self.loader is not None:
            self.position = self.loader.position
        self._batch_fraction, self._handed_out = 1.0, None


def _tokens(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Elements of what a model of sequences takes: ``input_ids``, or a first argument of integers in two dimensions."""
    first = args[0] if args else kwargs.get("input_ids")
    if isinstance(first, Mapping):
        first = first.get("input_ids")
    if isinstance(first, Tensor) and first.dim() == 2 and not first.is_floating_point():
        return first.numel()
    return 0
