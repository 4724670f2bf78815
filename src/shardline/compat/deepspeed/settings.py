"""What an engine says of its configuration and its ranks, under the names of DeepSpeed's methods."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from shardline.engine import Engine

__all__ = ["EngineSettings"]


class EngineSettings(Engine):
    """Reads of one engine, in addition to those that Shardline's engine has."""

    def loss_scale(self) -> float:  # type: ignore[override]
        """The current loss scale; 1.0 without fp16."""
        return self.scaler.scale

    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale is adapted."""
        return self.scaler.dynamic

    def gradient_clipping(self) -> float:
        return self.config.gradient_clipping

    def optimizer_name(self) -> str | None:
        return None if self.config.optimizer is None else self.config.optimizer.type.lower()

    def scheduler_name(self) -> str | None:
        return None if self.config.scheduler is None else self.config.scheduler.type

    def zero_optimization(self) -> bool:
        return self.zero_optimization_stage() > 0

    def zero_optimization_partition_gradients(self) -> bool:
        return self.zero_optimization_stage() >= 2

    def zero_optimization_partition_weights(self) -> bool:
        return self.weights_are_sharded

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """True: whole weights can always be gathered."""
        return True

    def wall_clock_breakdown(self) -> bool:
        return self.config.wall_clock_breakdown

    def steps_per_print(self) -> int | None:
        return self.config.steps_per_print

    def get_batch_info(self) -> tuple[int, int, int]:
        """``train_batch_size``, ``train_micro_batch_size_per_gpu``, ``gradient_accumulation_steps``."""
        return self.train_batch_size(), self.train_micro_batch_size_per_gpu(), self.gradient_accumulation_steps()

    def get_mom(self) -> list[Any]:
        """Momentum or betas of each param group."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [group.get("momentum", group.get("betas")) for group in groups]

    def get_type(self) -> list[Any]:
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [group.get("type") for group in groups]

    def set_lr(self, lr: float) -> None:
        """Give every param group this learning rate."""
        for group in [] if self.optimizer is None else self.optimizer.param_groups:
            group["lr"] = lr

    @property
    def dp_world_size(self) -> int:
        return self.world_size

    @property
    def mp_world_size(self) -> int:
        return 1

    @property
    def data_parallel_group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD
