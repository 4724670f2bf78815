"""``deepspeed.initialize``: Shardline's, from DeepSpeed's arguments, configuration and marks."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from shardline.compat.deepspeed import config as configuration
from shardline.compat.deepspeed.engine import DeepSpeedEngine
from shardline.compat.deepspeed.leaves import leaf_names
from shardline.compat.deepspeed.optimizer import EngineOptimizer, ParameterOffload
from shardline.compat.deepspeed.refusals import Refused
from shardline.compat.deepspeed.schedules import maker as schedule_maker
from shardline.compat.deepspeed.state_dict import StateDict
from shardline.compat.deepspeed.zero import give_status
from shardline.data import Loader
from shardline.engine.initialize import initialize as _initialize
from shardline.errors import UsageError
from shardline.events import Notice
from shardline.runtime.accelerator import get_accelerator

__all__ = ["initialize"]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[DeepSpeedEngine, EngineOptimizer | None, Loader | None, Any]:
    """An engine that trains ``model``; see :func:`shardline.initialize`. Collective.

    Returns:
        ``(engine, optimizer, loader, lr_scheduler)``; what was not asked for is ``None``.

    Raises:
        ConfigError: for what the configuration asks of DeepSpeed and Shardline does not have, each with a reason.
        UsageError: for ``mpu`` and ``mesh_param``.
    """
    if mesh_param is not None:
        raise UsageError("mesh_param is not supported: there is no sequence parallelism.")
    if isinstance(optimizer, type) and issubclass(optimizer, Refused):
        optimizer()
    given = [each for each in (config, config_params, getattr(args, "deepspeed_config", None)) if each is not None]
    if len(given) > 1 and any(each is not given[0] and each != given[0] for each in given):
        raise UsageError("the configuration was given more than once, by config and by args.deepspeed_config.")
    raw = configuration.read(given[0] if given else None)
    on_accelerator = get_accelerator().is_available()
    settings, notices = configuration.translate(raw, on_accelerator=on_accelerator)
    if model is not None and (leaves := leaf_names(model)):
        section = settings.setdefault("zero_optimization", {}).setdefault("leaf_module", {})
        section["names"] = [*section.get("names", ()), *leaves]
    plain, made, loader, scheduler = _initialize(
        _LocalRank(args) if hasattr(args, "local_rank") else None,
        model,
        optimizer,
        model_parameters,
        training_data,
        schedule_maker(settings) if lr_scheduler is None else lr_scheduler,
        distributed_port,
        mpu,
        dist_init_required,
        collate_fn,
        settings,
        engine_class=DeepSpeedEngine,
    )
    engine = cast(DeepSpeedEngine, plain)
    if engine.weights_are_sharded:
        give_status()
        if made is not None:
            made.parameter_offload = ParameterOffload()  # type: ignore[attr-defined]
        module = engine.module
        module.state_dict = StateDict(module)  # type: ignore[method-assign, assignment]
        engine.on_destroy(lambda: vars(module).pop("state_dict", None))
    for notice in notices:
        engine.events.emit(Notice(notice if notice != configuration.OFFLOAD_PARAM else _stays(engine)))
    return engine, None if made is None else EngineOptimizer(engine, made), loader, scheduler


class _LocalRank:
    """``args`` as far as they concern the place of this process: the configuration has been read."""

    def __init__(self, args: Any) -> None:
        self._args = args

    @property
    def local_rank(self) -> Any:
        return self._args.local_rank

    @local_rank.setter
    def local_rank(self, value: int) -> None:
        self._args.local_rank = value


def _stays(engine: DeepSpeedEngine) -> str:
    held = sum(param.numel() for param in engine.module.parameters()) * engine.precision.compute.itemsize
    share = -(-held // engine.world_size) if engine.weights_are_sharded else held
    return f"offload_param has no effect yet: about {share:,} bytes of weights stay on the device of each rank"
