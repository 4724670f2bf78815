"""``initialize``: from a model and a configuration to an engine that trains, in one call."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from shardline._version import __version__
from shardline.comm import Comm
from shardline.config import Config, load_config
from shardline.config.arguments import config_path
from shardline.data import Loader, length
from shardline.engine import Engine
from shardline.engine.origin import Origin
from shardline.errors import ConfigError, DisagreementError, LostRankError, ShardlineError, UsageError, text_of
from shardline.events import Notice
from shardline.features import meta
from shardline.features.offload import Offload
from shardline.features.recompute import recompute_blocks, recomputed_blocks
from shardline.observe import Console
from shardline.optim import arrange, lr
from shardline.optim.kinds import kind
from shardline.plan.placement import STAGES, Placement
from shardline.runtime.modes import outside_modes
from shardline.runtime.topology import Topology, discover, init_distributed, make_current
from shardline.sharding.admission import check_model
from shardline.sharding.build import (
    ParamGroups,
    group_parameters,
    lay_out,
    load_model,
    needs_whole,
    new_optimizer,
    resting_stage,
    sample_optimizer,
    take_over,
)
from shardline.sharding.precision import Precision
from shardline.sharding.unit import Unit

__all__ = ["initialize"]

T = TypeVar("T")
ConfigLike = str | os.PathLike[str] | Mapping[str, Any] | Config


@outside_modes
def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | Callable[[Any], Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: LRScheduler | Callable[[Optimizer], Any] | None = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: ConfigLike | None = None,
    mesh: Any = None,
    config_params: ConfigLike | None = None,
    *,
    init_fn: Callable[[nn.Module], None] | None = None,
) -> tuple[Engine, Optimizer | None, Loader | None, Any]:
    """Turn ``model`` into an engine over all ranks of the job. Collective: every rank calls it alike.

    Args:
        args: a namespace with ``shardline_config`` or ``deepspeed_config`` (a path), and perhaps ``local_rank``, which
            afterwards holds this process's.
        model: an ``nn.Module`` on any device. Its parameters become views of the engine's buffers; rank 0's weights
            and buffers win on every rank. On ``meta`` it is filled as its constructor would have, a part at a time.
        optimizer: a ``torch.optim.Optimizer`` over the model's parameters, taken over in place, or a callable that
            makes one from them; wins over the configuration.
        model_parameters: parameters or param groups to train; all that require a gradient if left out.
        training_data: a dataset; gives the loader that is returned.
        lr_scheduler: a scheduler on ``optimizer``, or a callable that makes one from the returned optimizer.
        distributed_port: port of rank 0 where the environment names none.
        mpu: not supported.
        dist_init_required: ``False`` says that a process group exists already.
        collate_fn: list of samples to batch, for the loader.
        config: a dict, a path of a JSON file, or a :class:`shardline.Config`.
        mesh: a one-dimensional ``DeviceMesh`` whose group the engine uses instead of all ranks.
        config_params: another name of ``config``.
        init_fn: for a model on ``meta``: gets each module, in the order of ``nn.Module.apply``, after its own
            initialisers have run, and writes its parameters in place.

    Returns:
        ``(engine, optimizer, loader, lr_scheduler)``; what was not asked for is ``None``.

    Raises:
        ConfigError, OptimizerError, ModelError, DataError: for what cannot work, in one sentence that says what to do.
        DisagreementError: if ranks hold different configurations, models or versions, or other ranks alone failed.

    After these errors model and optimizer are as they were, and may be given again. After an error of another class on
    one of several ranks, while the model is loaded, they are not: make them again.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"initialize was given model={type(model).__name__}; it needs a torch.nn.Module.")
    check_model(model)
    if mpu is not None:
        raise UsageError("mpu is not supported: the engine shards over all ranks, or over the group of mesh=.")
    source = _one_config(args, config, config_params)
    init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    topology = discover(getattr(args, "local_rank", None), model)
    make_current(topology.device)  # a script that makes its own process group need not have done it
    if hasattr(args, "local_rank"):
        args.local_rank = topology.local_rank
    group = _group(mesh)
    world = 1 if group is None else dist.get_world_size(group)
    settings = load_config(source, world, batches=training_data is not None)
    comm = Comm(group, topology.device, transport=settings.communication_transport)
    with ExitStack() as undo:  # where it fails, the model is as it was and may be given again
        undo.callback(comm.close)
        engine = _make_engine(
            model, optimizer, model_parameters, training_data, lr_scheduler, collate_fn, init_fn, settings, topology,
            comm, undo,
        )  # fmt: skip
        engine.checkpoints.resume()
        undo.pop_all()
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _make_engine(
    model: nn.Module,
    optimizer: Optimizer | Callable[[Any], Optimizer] | None,
    model_parameters: Iterable[Any] | None,
    training_data: Any,
    lr_scheduler: LRScheduler | Callable[[Optimizer], Any] | None,
    collate_fn: Callable[[list[Any]], Any] | None,
    init_fn: Callable[[nn.Module], None] | None,
    settings: Config,
    topology: Topology,
    comm: Comm,
    undo: ExitStack,
) -> Engine:
    """An engine on ``comm``; ``undo`` gets what takes back each thing that was done for it."""
    comm.agree(
        {
            "the version of torch": torch.__version__,
            "the version of shardline": __version__,
            **{f"the configuration's {key}": value for key, value in settings.to_dict().items()},
            "the length of training_data": length(training_data),
        }
    )
    _refuse_offload_param(settings, comm.device)
    precision = Precision.from_config(settings)
    again = settings.activation_checkpointing
    recomputed = recomputed_blocks(model, again.every) if again.enabled else []

    given, groups = _optimizer_and_groups(model, optimizer, model_parameters, settings)
    membership = group_parameters(model, groups)
    if given is None and settings.optimizer is not None:
        groups = arrange(settings.optimizer.type, model, groups)
        membership = group_parameters(model, groups)
    offload = Offload.from_config(settings, comm.device)
    whole = False
    if given is not None or settings.optimizer is not None:
        sample = given or sample_optimizer(settings.optimizer.type, settings.optimizer.params)  # type: ignore[union-attr]
        whole = needs_whole(sample, resting_stage(settings, offload), comm.world_size)
    else:
        membership = {}

    _check_scheduler(lr_scheduler, given, trains=given is not None or settings.optimizer is not None)
    loader = None if training_data is None else make_loader(training_data, settings, comm, collate_fn)
    if loader is not None:
        undo.callback(loader.close)

    made: list[weakref.ref[Engine]] = []  # weak: the units, which the engine owns, must not keep it alive

    def on_touch(unit: Unit) -> bool:
        engine = made[0]() if made else None
        return engine is not None and engine._touched(unit)

    layout = lay_out(model, settings, precision, comm, membership, whole=whole, on_touch=on_touch, offload=offload)

    # from here on the model changes

    origin, everywhere = Origin(model, given), _Everywhere(comm)

    def go_back(kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and everywhere.has(error):  # else nobody would join in
            origin.restore(layout, error)
            for engine in [each() for each in made]:
                if engine is not None:
                    engine.destroy()

    undo.push(go_back)
    fill = partial(meta.fill, model, init_fn=init_fn) if meta.is_on_meta(model) else None
    load_model(model, layout, precision, comm, fill)

    def finish() -> Engine:
        final: Optimizer | None = given
        if given is not None:
            take_over(given, layout)
        elif settings.optimizer is not None:
            final = new_optimizer(settings.optimizer.type, settings.optimizer.params, groups, layout)
        engine = Engine(model, layout, final, membership, settings, precision, topology, comm, whole=whole)
        made.append(weakref.ref(engine))
        engine.lr_scheduler = _scheduler(lr_scheduler, final, settings)
        if loader is not None:
            engine.training_dataloader = loader
            engine._note_loader()
            engine.training_dataloader.on_batch = engine._batch_comes
            engine.training_dataloader.on_error = comm.give_up
        if recomputed:
            offloaded = again.offload and comm.device.type != "cpu"
            engine._undo.append(recompute_blocks(recomputed, offload=offloaded))
        return engine

    engine = everywhere.run(finish)
    Console().attach(engine.events, settings, comm.rank)
    for notice in filter(None, (topology.notice, comm.notice, _advice(engine, topology))):
        engine.events.emit(Notice(notice))
    if settings.no_effect:
        engine.events.emit(
            Notice("these configuration keys have no effect here: " + ", ".join(sorted(settings.no_effect)))
        )
    if settings.zero_optimization.offload_optimizer.device == "cpu" and offload is None:
        engine.events.emit(Notice("offload_optimizer has no effect: masters and optimizer state are in host memory"))
    if settings.zero_optimization.offload_param.device == "cpu":
        engine.events.emit(Notice("offload_param has no effect: weights stay where the model computes"))
    if recomputed and again.offload and comm.device.type == "cpu":
        engine.events.emit(Notice("activation_checkpointing.offload has no effect: the model is in host memory"))
    return engine


class _Everywhere:
    """Errors that every rank of ``comm`` knows of."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._told: BaseException | None = None

    def run(self, work: Callable[[], T]) -> T:
        """What ``work``, which talks to nobody, returns, if it raises on no rank. Collective.

        Raises:
            DisagreementError: where only other ranks raised.
        """
        try:
            result = work()
        except Exception as error:
            self._comm.exchange(f"{type(error).__name__}: {text_of(error)}")
            self._told = error
            raise
        for rank, said in enumerate(self._comm.exchange(None)):
            if said is not None:
                raise DisagreementError(f"initialize failed on rank {rank}, and not on this one: {said}")
        return result

    def has(self, error: BaseException) -> bool:
        alike = isinstance(error, ShardlineError) and not isinstance(error, LostRankError)
        return alike or error is self._told or self._comm.world_size == 1


def _advice(engine: Engine, topology: Topology) -> str | None:
    """What costs more than it must where gradients travel between hosts."""
    if topology.world_size == topology.local_world_size or engine.comm.world_size == 1 or engine.optimizer is None:
        return None
    larger = any(
        bucket.shard.stage.states is Placement.REPLICATED and bucket.grads.dtype.itemsize > bucket.plan.dtype.itemsize
        for unit in engine._layout.units
        for bucket in unit.trainable
    )
    if not larger or kind(engine.optimizer) == "global":  # of that kind no other stage can have it
        return None
    return (
        "stage 0 keeps whole optimizer states on every rank, so reduced gradients travel between hosts in fp32, where "
        "stage 1 sends weights, which are half as large. It gives the same results and takes less memory, too: set "
        "zero_optimization.stage to 1"
    )


def _refuse_offload_param(settings: Config, device: torch.device) -> None:
    zero = settings.zero_optimization
    if zero.offload_param.device == "cpu" and STAGES[zero.stage].weights is Placement.SHARDED and device.type != "cpu":
        raise ConfigError(
            f'zero_optimization.offload_param.device is "cpu", and weights stay on the {device.type} device here, '
            f"divided over the ranks. If the model fits, deleting offload_param from the file is all there is to do."
        )


def _one_config(args: Any, config: ConfigLike | None, config_params: ConfigLike | None) -> ConfigLike | None:
    ways = {"config": config, "config_params": config_params, "args": config_path(args)}
    found = {way: value for way, value in ways.items() if value is not None}
    if len(found) > 1:
        raise ConfigError(f"the configuration was given more than once: by {' and by '.join(found)}. Give it once.")
    return next(iter(found.values()), None)


def _group(mesh: Any) -> dist.ProcessGroup | None:
    if mesh is None:
        return dist.group.WORLD
    if mesh.ndim != 1:
        raise UsageError(f"mesh has {mesh.ndim} dimensions; the engine shards over one. Pass one of its sub-meshes.")
    return mesh.get_group()  # type: ignore[no-any-return]


def _optimizer_and_groups(
    model: nn.Module,
    optimizer: Optimizer | Callable[[Any], Optimizer] | None,
    model_parameters: Iterable[Any] | None,
    settings: Config,
) -> tuple[Optimizer | None, ParamGroups]:
    """The user's optimizer where there is one, and the param groups to train."""
    if isinstance(optimizer, Optimizer):
        return optimizer, optimizer.param_groups
    items = [model_parameters] if isinstance(model_parameters, dict) else list(model_parameters or ())
    if model_parameters is None:
        items = [param for param in model.parameters() if param.requires_grad]
    items = [_parameter(item) if not isinstance(item, dict) else item for item in items]
    if callable(optimizer):
        made = optimizer(items)
        if not isinstance(made, Optimizer):
            raise UsageError(f"the optimizer callable returned {type(made).__name__}, not a torch.optim.Optimizer.")
        return made, made.param_groups
    if items and isinstance(items[0], dict):
        groups = [{**group, "params": list(group["params"])} for group in items]
        return None, [group for group in groups if group["params"]]
    return None, [{"params": items}]


def _parameter(item: Any) -> nn.Parameter:
    """One of ``model_parameters``: a parameter, or a (name, parameter) pair as ``named_parameters`` gives it."""
    found = item[1] if isinstance(item, tuple) and len(item) == 2 else item
    if not isinstance(found, torch.Tensor):
        raise UsageError(
            f"model_parameters holds {type(item).__name__} {item!r}. Give parameters (model.parameters()) or param "
            f'groups ({{"params": [...], "lr": ...}}).'
        )
    return found  # type: ignore[return-value]


def _is_made(scheduler: Any) -> bool:
    """Whether ``scheduler`` is one, as opposed to what makes one."""
    return hasattr(scheduler, "step") and not isinstance(scheduler, type)


def _check_scheduler(given: Any, optimizer: Optimizer | None, *, trains: bool) -> None:
    if given is not None and not trains:
        raise UsageError("an lr_scheduler was given without an optimizer. Give initialize an optimizer as well.")
    if _is_made(given) and getattr(given, "optimizer", optimizer) is not optimizer:
        raise UsageError(
            "the lr_scheduler is attached to another optimizer than the engine's. Attach it to the optimizer that "
            "you pass to initialize, or pass a callable: lr_scheduler=lambda optimizer: ..."
        )


def _scheduler(given: Any, optimizer: Optimizer | None, settings: Config) -> Any:
    if given is None:
        if settings.scheduler is None or optimizer is None:
            return None
        return lr.build(settings.scheduler.type, optimizer, settings.scheduler.params)
    return given if _is_made(given) else given(optimizer)


def make_loader(data: Any, settings: Config, comm: Comm, collate_fn: Callable[[list[Any]], Any] | None) -> Loader:
    """The loader of ``data`` as ``data_loader`` configures it."""
    options = settings.data_loader
    return Loader(
        data,
        global_batch=settings.train_batch_size,
        micro_batch=settings.train_micro_batch_size_per_gpu,
        accumulation=settings.gradient_accumulation_steps,
        rank=comm.rank,
        world_size=comm.world_size,
        seed=settings.seed if options.seed is None else options.seed,
        shuffle=options.shuffle,
        drop_last=options.drop_last,
        num_workers=options.num_workers,
        pin_memory=options.pin_memory,
        collate_fn=collate_fn,
        prefetch_factor=options.prefetch_factor,
        persistent_workers=options.persistent_workers,
    )
