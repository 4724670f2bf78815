"""Accelerate's ``Accelerator``, which shards what it prepares.

    accelerator = Accelerator(shardline={"zero_optimization": {"stage": 3}}, gradient_accumulation_steps=2)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

All else of a loop on Accelerate stays as it is.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

import shardline
from shardline.engine.in_place import InPlaceEngine
from shardline.errors import CheckpointError, UsageError
from shardline.integrations import require
from shardline.integrations.engines import make_engine, not_last

require("accelerate", "shardline.integrations.accelerate")

import accelerate  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402

__all__ = ["Accelerator", "ShardedOptimizer"]

FOLDER, TAG = "shardline", "state"
"""Where the checkpoint of an engine is in a folder of the client's."""


class ShardedOptimizer(AcceleratedOptimizer):
    """A prepared optimizer whose state an engine saves and loads by itself.

    Args:
        optimizer: in place.
        scaler: Accelerate's, if there is one.
        is_held: whether the engine saves or loads now.
    """

    _HELD = {"held by": FOLDER}

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: Any, is_held: Callable[[], bool]) -> None:
        super().__init__(optimizer, device_placement=False, scaler=scaler)
        self._is_held = is_held

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer; where the engine saves it, a word that says so."""
        state: dict[str, Any] = dict(self._HELD) if self._is_held() else self.optimizer.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load it, on every rank; or see that the engine does.

        Raises:
            CheckpointError: if only the checkpoint of an engine holds it, and none is loaded.
        """
        if state_dict != self._HELD:
            self.optimizer.load_state_dict(state_dict)
        elif not self._is_held():
            raise CheckpointError(
                "this optimizer state only refers to the Shardline checkpoint beside it. Load the folder with "
                "accelerator.load_state(), or with engine.load_checkpoint()."
            )


class Accelerator(accelerate.Accelerator):
    """An ``accelerate.Accelerator`` whose :meth:`prepare` shards each model together with its optimizer, in place.

    Mixed precision is Accelerate's: autocast over fp32 weights, and its loss scale in fp16. A model in bf16 with fp32
    masters is the configuration's ``bf16``. ``dynamo_backend=`` compiles block by block. ``save_state`` and
    ``load_state`` save and load by the engine: sharded, and at any stage and number of ranks.

    Args:
        shardline: the configuration of :func:`shardline.shard`: a dict, a path or a ``shardline.Config``.

    Attributes:
        engines: those of the models that were prepared with their optimizers.
    """

    def __init__(self, *args: Any, shardline: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begin(shardline)

    @classmethod
    def of(cls, plain: accelerate.Accelerator, config: Any) -> Accelerator:
        """Make ``plain``, which has prepared nothing, one of this class; it stays the same object."""
        plain.__class__ = cls
        if not isinstance(plain, cls):
            raise AssertionError("an object has the class that it was given")
        plain._begin(config)
        return plain

    def _begin(self, config: Any) -> None:
        self.engines: WeakSet[InPlaceEngine] = WeakSet()
        self._shardline_config = config
        self._is_held = False
        self._waiting: list[nn.Module] = []  # models that came without an optimizer so far
        plugin = self.state.dynamo_plugin
        self._compile = None if plugin.backend.value == "NO" else plugin.to_kwargs()
        plugin.backend = type(plugin.backend).NO  # the engine compiles
        self.register_save_state_pre_hook(self._save_hook)
        self.register_load_state_pre_hook(self._load_hook)

    def engine_of(self, model: nn.Module) -> InPlaceEngine | None:
        """The engine behind ``model``, which was prepared, if there is one."""
        return next((engine for engine in self.engines if engine.module is model), None)

    # -- preparing ----------------------------------------------------------------------------------------------------

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """As Accelerate's. An optimizer is prepared together with its model, or after it.

        Raises:
            UsageError: for an optimizer without its model.
            ShardlineError: as :func:`shardline.shard`.
        """
        if any(isinstance(each, shardline.Engine) for each in args):
            raise UsageError("prepare was given an engine. Give it the model and the optimizer, which it shards.")
        self._waiting += [each for each in args if isinstance(each, nn.Module) and self.engine_of(each) is None]
        for each in args:
            if isinstance(each, torch.optim.Optimizer) and not isinstance(each, AcceleratedOptimizer):
                self._shard(each)
        return super().prepare(*args, device_placement=device_placement)

    def _shard(self, optimizer: torch.optim.Optimizer) -> None:
        params = {id(param) for group in optimizer.param_groups for param in group["params"]}
        owners = [model for model in self._waiting if params <= set(map(id, model.parameters()))]
        if not owners:
            raise UsageError(
                "prepare was given an optimizer whose parameters are not all of one model that was prepared. Prepare "
                "each model together with an optimizer of its own: accelerator.prepare(model, optimizer)."
            )
        model = owners[0]
        engine = make_engine(model, optimizer, self._shardline_config, device=self.device, compile=self._compile)
        self._waiting = [each for each in self._waiting if each is not model]
        self.engines.add(engine)

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """As Accelerate's; a model with an engine is where it belongs, and is not wrapped."""
        if self.engine_of(model) is not None:
            device_placement, evaluation_mode = False, True
        evaluation_mode = evaluation_mode or any(each is model for each in self._waiting)
        prepared: nn.Module = super().prepare_model(model, device_placement, evaluation_mode)
        return prepared

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None) -> Any:
        """As Accelerate's, for an optimizer that :meth:`prepare` has given to an engine."""
        if not isinstance(optimizer, AcceleratedOptimizer):
            optimizer = ShardedOptimizer(optimizer, self.scaler, lambda: self._is_held)
            optimizer._is_accelerate_prepared = True
        return super().prepare_optimizer(optimizer, device_placement=False)

    # -- training -----------------------------------------------------------------------------------------------------

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Within it, a backward is not the last of its window: stages 0 and 1 reduce later, the others as always."""
        engine = self.engine_of(model)
        with super().no_sync(model) if engine is None else not_last([engine]):
            yield

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        """As Accelerate's; all parameters of one engine in one pass."""
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        engine = self._whose(params) if norm_type == 2 else None
        if engine is None:
            norm: Tensor = super().clip_grad_norm_(params, max_norm, norm_type)
            return norm
        self.unscale_gradients()
        return engine.clip_grad_norm_(max_norm)

    def _whose(self, params: list[Tensor]) -> InPlaceEngine | None:
        """The engine of which ``params`` are all that is trained."""
        given = {id(param) for param in params if param.requires_grad}
        for engine in self.engines:
            if {id(param) for param in engine.module.parameters() if param.requires_grad} == given:
                return engine
        return None

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """The whole model's state, on CPU, on every rank. Collective."""
        engine = self.engine_of(model)
        if engine is not None:
            return {} if self._is_held else engine.full_state_dict()
        state: dict[str, Any] = super().get_state_dict(model, unwrap)
        return state

    def free_memory(self, *objects: Any) -> Any:
        """As Accelerate's. The engines of models among ``objects`` are taken off them. Collective at stage 3."""
        for engine in [self.engine_of(each) for each in objects if isinstance(each, nn.Module)]:
            if engine is not None:
                engine.destroy()
                self.engines.discard(engine)
        self._waiting.clear()
        return super().free_memory(*objects)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save_state(self, output_dir: str | None = None, safe_serialization: bool = True, **options: Any) -> Any:
        """As Accelerate's; models and optimizers in the engines' own checkpoints, in that folder. Collective."""
        with self._held():
            return super().save_state(output_dir, safe_serialization, **options)

    def load_state(self, input_dir: str | None = None, load_kwargs: Any = None, **options: Any) -> None:
        """Load what :meth:`save_state` saved, at any stage and number of ranks. Collective.

        Raises:
            CheckpointError: if the folder holds no checkpoint of an engine, or it does not fit.
        """
        with self._held():
            super().load_state(input_dir, load_kwargs, **options)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Within it, the engines save and load the state of models and optimizers; see the hooks below."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def _save_hook(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        save_engines(self._engines_of(models), folder)
        weights[:] = [state for model, state in zip(models, weights, strict=True) if self.engine_of(model) is None]

    def _load_hook(self, models: list[nn.Module], folder: str) -> None:
        load_engines(self._engines_of(models), folder)
        models[:] = [model for model in models if self.engine_of(model) is None]

    def _engines_of(self, models: list[nn.Module]) -> list[InPlaceEngine]:
        return [engine for engine in map(self.engine_of, models) if engine is not None]

    @contextmanager
    def saving(self, model: nn.Module, folder: str, *, frozen: bool = True) -> Iterator[None]:
        """Save the engine of ``model`` to ``folder``; within, its optimizer's ``state_dict()`` says so. Collective.

        Args:
            model: a prepared one.
            folder: of the client's checkpoint.
            frozen: whether the weights of frozen parameters are saved.
        """
        save_engines(self._engines_of([model]), folder, frozen=frozen)
        with self._held():
            yield

    @contextmanager
    def loading(self, model: nn.Module, folder: str) -> Iterator[None]:
        """Load what :meth:`saving` saved; within, its optimizer's ``load_state_dict`` has nothing to do. Collective."""
        load_engines(self._engines_of([model]), folder)
        with self._held():
            yield


def holds_engine(folder: str) -> bool:
    """Whether ``folder`` holds a checkpoint of an engine."""
    return os.path.isdir(os.path.join(folder, FOLDER))


def save_engines(engines: list[InPlaceEngine], folder: str, *, frozen: bool = True) -> None:
    """Save each to a place of its own in ``folder``. Collective."""
    for path, engine in zip(_places(folder), engines, strict=False):
        engine.save_checkpoint(path, TAG, exclude_frozen_parameters=not frozen)


def load_engines(engines: list[InPlaceEngine], folder: str, *, weights_only: bool = False) -> None:
    """Load each from its place in ``folder``. Collective.

    Raises:
        CheckpointError: if it is not there, or does not fit.
    """
    for path, engine in zip(_places(folder), engines, strict=False):
        found, _ = engine.load_checkpoint(path, load_module_only=weights_only)
        if found is None:
            raise CheckpointError(
                f"{folder} holds no checkpoint of Shardline: it was saved without one. Load its weights into the "
                f"model before it is sharded."
            )


def _places(folder: str) -> Iterator[str]:
    return (os.path.join(folder, FOLDER if number == 0 else f"{FOLDER}_{number}") for number in itertools.count())
