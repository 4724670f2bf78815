"""The engine under DeepSpeed's names: attributes and methods that Shardline's engine lacks, or has in another form."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler

from shardline.compat.deepspeed.settings import EngineSettings
from shardline.compat.deepspeed.write_events import Monitor
from shardline.engine import Engine
from shardline.errors import UsageError

__all__ = [
    "NOT_OFFERED",
    "DeepSpeedEngine",
    "DeepSpeedOptimizerCallable",
    "DeepSpeedSchedulerCallable",
]

DeepSpeedOptimizerCallable = Callable[[Any], Optimizer]
DeepSpeedSchedulerCallable = Callable[[Optimizer], Any]

NOT_OFFERED = {
    "allreduce_gradients": "engine.backward and engine.step reduce by themselves",
    "coalesce_grad_reduction": "use engine.no_sync(), which works at every stage",
    "set_custom_curriculum_learning_schedule": "order the dataset, or bring a loader",
    "set_data_post_process_func": "give initialize a collate_fn",
    "set_train_batch_size": "batch sizes are those of the configuration",
    "set_train_micro_batch_size": "batch sizes are those of the configuration",
    "train_batch": "there is no pipeline parallelism",
    "eval_batch": "there is no pipeline parallelism",
    "save_mp_checkpoint_path": "there is no tensor parallelism",
}
"""Methods of DeepSpeed's engine that are not there, and what to do instead."""


def _counter(name: str) -> Any:
    """The engine's counter ``name``, which can be written as well."""
    counter: property = getattr(Engine, name)

    def write(engine: Engine, value: int) -> None:
        setattr(engine.progress, name, value)

    return counter.setter(write)


class DeepSpeedEngine(EngineSettings):
    """An engine with DeepSpeed's attributes. Made by ``initialize`` of this package, which gives an engine this class.

    A window's gradient is the **sum** of what its backwards gave, over the ranks the mean, however many calls of
    :meth:`step` lay in it.
    """

    _ended_window = False  # by the last call of step

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.monitor = Monitor(self.events, self.progress, enabled=self.config.is_observed)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:  # type: ignore[override]
        """End a micro-step; at the accumulation boundary, update the weights."""
        boundary = self.is_gradient_accumulation_boundary()
        super().step(boundary=boundary, lr_kwargs=lr_kwargs)
        self._ended_window = boundary

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard what this window has accumulated; see Shardline's engine."""
        if self.trainables.is_closed:
            raise UsageError(
                "zero_grad() was called on an engine that was destroyed. A second train() of one Trainer does so: "
                "Accelerate drops the engine, and the Trainer does not make a new one. Set trainer.model_wrapped = "
                "trainer.model between the two."
            )
        super().zero_grad(set_to_none)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to start a plain ``.backward()`` from: ``loss`` times the loss scale."""
        self.trainables.check_trains("scale()")
        return self._backwards.scaled(loss) if self.fp16_enabled() else loss

    def last_step_skipped(self) -> bool:
        """Whether the last call of :meth:`step` ended a window and changed nothing."""
        return self._ended_window and not self.was_step_applied()

    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> DataLoader[Any]:
        """torch's loader of ``dataset`` for this rank, shuffled for ``route`` "train"."""
        if data_sampler is None:
            data_sampler = DistributedSampler(dataset, self.world_size, self.global_rank, shuffle=route == "train")
        return DataLoader(
            dataset,
            self.train_micro_batch_size_per_gpu() if batch_size is None else batch_size,
            sampler=data_sampler,
            num_workers=num_local_io_workers or 0,
            collate_fn=collate_fn,
            pin_memory=pin_memory and self.device.type != "cpu",
            drop_last=self.config.data_loader.drop_last,
        )

    # -- counters, which scripts also write -------------------------------------------------------------------------

    global_steps = _counter("global_steps")
    global_samples = _counter("global_samples")
    micro_steps = _counter("micro_steps")
    skipped_steps = _counter("skipped_steps")

    @property
    def is_compiled(self) -> bool:
        """Whether :meth:`compile` was called."""
        return self._is_compiled

    _is_compiled = False

    def compile(
        self,
        backend: Any = "inductor",
        compile_kwargs: Mapping[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """Compile the model block by block."""
        if schedule is not None or compiled_autograd_enabled:
            raise UsageError("engine.compile takes no schedule and no compiled autograd here. Leave them out.")
        super().compile(backend=backend, **(compile_kwargs or {}))
        self._is_compiled = True

    # -- weights ----------------------------------------------------------------------------------------------------

    def _consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor] | None:
        """The whole model in its compute dtype on rank 0, None on other ranks. Collective."""
        whole = self.full_state_dict(dtype=self.precision.compute, rank0_only=True)
        if self.global_rank != 0:
            return None
        return self._without_frozen(whole) if exclude_frozen_parameters else whole

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor] | None:
        return self._consolidated_16bit_state_dict(exclude_frozen_parameters)

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor]:
        """The whole model in its compute dtype, on every rank. Collective."""
        whole = self.full_state_dict(dtype=self.precision.compute)
        return self._without_frozen(whole) if exclude_frozen_parameters else whole

    def _without_frozen(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        every = self.module.named_parameters(remove_duplicate=False)
        frozen = {name for name, param in every if not param.requires_grad}
        return {name: value for name, value in whole.items() if name not in frozen}

    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the whole model in its compute dtype, by ``torch.save``, or as safetensors where the name says so."""
        if save_filename.endswith(".safetensors"):
            return super().save_16bit_model(save_dir, save_filename, exclude_frozen_parameters)
        state = self._consolidated_16bit_state_dict(exclude_frozen_parameters)
        if state is not None:
            os.makedirs(save_dir, exist_ok=True)
            torch.save(state, os.path.join(save_dir, save_filename))
        return True

    save_fp16_model = save_16bit_model

    def save_checkpoint(  # type: ignore[override]
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save everything that a resume needs; see Shardline's engine."""
        return super().save_checkpoint(save_dir, tag, client_state or {}, save_latest, exclude_frozen_parameters)

    def offload_states(  # type: ignore[override]
        self, include: Any = None, device: Any = "cpu", pin_memory: bool = True, non_blocking: bool = False
    ) -> None:
        """Move masters and optimizer state to host memory, both of them whatever ``include`` names."""
        if device != "cpu":
            raise UsageError(f"engine.offload_states was given device={device!r}. States go to host memory: 'cpu'.")
        super().offload_states()

    def reload_states(self, non_blocking: bool = False) -> None:  # type: ignore[override]
        """Bring them back."""
        super().reload_states()

    def empty_partition_cache(self) -> None:
        """Nothing to do: a unit is released after its last use."""

    def __getattr__(self, name: str) -> Any:
        if name in NOT_OFFERED:

            def refuse(*args: Any, **kwargs: Any) -> NoReturn:
                raise UsageError(f"engine.{name} is not offered by Shardline's stand-in: {NOT_OFFERED[name]}.")

            return refuse
        return super().__getattr__(name)
