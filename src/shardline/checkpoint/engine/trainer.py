"""The interface of an engine that saving and loading use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from shardline.checkpoint.engine.view import EngineView
from shardline.checkpoint.engine.window import WindowStart
from shardline.comm import Comm
from shardline.config import Config
from shardline.data import Loader
from shardline.events import Events
from shardline.sharding.precision import LossScaler

__all__ = ["Trainer"]


class Trainer(Protocol):
    """An engine, as a checkpoint sees it."""

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
        """Steps so far. Reading it waits for nothing."""
        ...

    def save_sinks(self) -> dict[str, dict[str, str]]:
        """Have sinks write what is left; returns what they need to go on with the same run, by name."""
        ...

    def checkpoint_view(self) -> EngineView:
        """The engine's tensors, with edits adopted and the last step's verdict read."""
        ...

    def checkpoint_counters(self) -> dict[str, int]:
        """Steps, micro-steps and samples at the start of the current window."""
        ...

    def in_window(self) -> bool:
        """Whether micro-steps were done that no step has applied."""
        ...

    def lay_out_by_state_steps(self, steps: Mapping[str, int]) -> None:
        """Lay the model out so that only parameters whose states have seen as many steps share a run. Collective."""
        ...

    def go_on_from(self, counters: Mapping[str, int]) -> None:
        """Drop the current window; counts continue from ``counters``."""
        ...
