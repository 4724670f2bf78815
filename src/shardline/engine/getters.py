"""Figures of an engine, under DeepSpeed's names for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardline.comm import Comm
from shardline.config import Config
from shardline.engine.outcome import Outcome
from shardline.engine.parameter_access import ParameterAccess
from shardline.engine.trainables import Trainables
from shardline.engine.weights import names_of
from shardline.engine.window_grads import WindowGrads
from shardline.plan.placement import STAGES, Placement
from shardline.runtime.modes import outside_modes
from shardline.runtime.topology import Topology
from shardline.sharding.precision import LossScaler
from shardline.sharding.schedule import Schedule
from shardline.sharding.window import Progress

__all__ = ["Getters"]


class Getters:
    """Reads of one engine. What depends on the last step waits for its verdict, on this rank alone."""

    optimizer: Optimizer | None
    config: Config
    topology: Topology
    comm: Comm
    scaler: LossScaler
    progress: Progress
    trainables: Trainables
    _outcome: Outcome
    _grads: WindowGrads

    @property
    def schedule(self) -> Schedule:
        """What gathers, releases and reduces the units of the current layout."""
        return self.trainables.schedule

    @property
    def global_steps(self) -> int:
        """Optimizer steps so far, skipped ones included."""
        return self.progress.global_steps

    @property
    def micro_steps(self) -> int:
        """Calls of :meth:`step` so far."""
        return self.progress.micro_steps

    @property
    @outside_modes
    def global_samples(self) -> int:
        """Samples of all ranks together that the steps have seen."""
        self._outcome.read()
        return self.progress.global_samples

    @property
    @outside_modes
    def skipped_steps(self) -> int:
        """Steps whose gradients were not finite, so that nothing was changed."""
        self._outcome.read()
        return self.progress.skipped_steps

    @outside_modes
    def was_step_applied(self) -> bool:
        """Whether the last step changed the weights."""
        self._outcome.read()
        return self.progress.applied

    def get_global_grad_norm(self) -> float | Tensor | None:
        """L2 norm of the last step's averaged gradients before clipping; a 0-dim tensor where reading it would wait."""
        return self.progress.norm

    @outside_modes
    def get_lr(self) -> list[float]:
        """The learning rate of each param group, at which the next update runs."""
        self._outcome.read()
        return [] if self.optimizer is None else [float(group["lr"]) for group in self.optimizer.param_groups]

    def parameter(self, param: nn.Parameter | str) -> ParameterAccess:
        """The gradient, the master and the optimizer state of one parameter, given itself or by its name.

        Raises:
            UsageError: for what is not a parameter of the model.
        """
        self.trainables.check_open("parameter()")
        layout = self.trainables.layout
        (name,) = names_of(layout, [param])
        return ParameterAccess(name, layout.params[name], self.trainables, self._grads, self.comm)

    @property
    def local_rank(self) -> int:
        return self.topology.local_rank

    @property
    def global_rank(self) -> int:
        """The number of this process among those that train this model: the job's, or those of ``mesh=``."""
        return self.comm.data.rank

    @property
    def world_size(self) -> int:
        """How many processes train this model; ``engine.topology`` has the numbers of the whole job."""
        return self.comm.data.size

    @property
    def device(self) -> torch.device:
        return self.topology.device

    def train_batch_size(self) -> int:
        return self.config.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.config.train_micro_batch_size_per_gpu

    def gradient_accumulation_steps(self) -> int:
        return self.config.gradient_accumulation_steps

    def zero_optimization_stage(self) -> int:
        return self.config.zero_optimization.stage

    @property
    def weights_are_sharded(self) -> bool:
        """Whether weights rest sharded between two uses (stage 3), so that every rank has to run each forward."""
        return STAGES[self.zero_optimization_stage()].weights is Placement.SHARDED

    def bfloat16_enabled(self) -> bool:
        return self.config.bf16.enabled

    def fp16_enabled(self) -> bool:
        return self.config.fp16.enabled

    @property
    def loss_scale(self) -> float:
        """The current loss scale; 1.0 without fp16."""
        return self.scaler.scale
