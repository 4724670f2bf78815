"""The tensors of an engine, as a checkpoint reads and writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from shardline.comm import Comm
from shardline.plan import ParamSpec
from shardline.sharding.averages import Averages
from shardline.sharding.bucket import RunTensors
from shardline.sharding.fragments import ParamState
from shardline.sharding.unit import Unit

__all__ = ["EngineView"]


@dataclass
class EngineView:
    """The tensors of one engine in its current layout, to be read and written in place.

    Attributes:
        runs: this rank's runs, the very tensors that the optimizer holds.
        frozen_states: the optimizer state of frozen parameters, whole on every rank.
        averages: the moving averages of the weights, where there are any.
        groups: the param group of every parameter that the optimizer was given, frozen ones too, by first name.
    """

    module: nn.Module
    units: Sequence[Unit]
    runs: Sequence[RunTensors]
    optimizer: Optimizer | None
    frozen_states: dict[str, ParamState]
    averages: Averages
    groups: Mapping[str, int]
    comm: Comm

    @property
    def specs(self) -> dict[str, ParamSpec]:
        """Every parameter of the model, by first name."""
        return {
            entry.param.name: entry.param
            for unit in self.units
            for bucket in unit.plan.buckets
            for entry in bucket.entries
        }  # fmt: skip


def optimizer_name(optimizer: Optimizer) -> str:
    """The class whose state it keeps."""
    return type(optimizer).__name__
