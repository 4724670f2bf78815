"""``initialize``: from a model and a configuration to an engine that trains, in one call."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
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
from shardline.config.monitoring import OF_RANK_0
from shardline.config.schema import Optimizer as OptimizerSection
from shardline.data import Loader, length
from shardline.engine import Engine
from shardline.engine.origin import Origin
from shardline.errors import ConfigError, DisagreementError, LostRankError, ShardlineError, UsageError, text_of
from shardline.events import Notice
from shardline.features import meta
from shardline.features.offload import Offload
from shardline.features.recompute import recompute_blocks, recomputed_blocks
from shardline.features.streaming import StreamedWeights
from shardline.observe.registry import check_packages, sinks_of
from shardline.observe.sinks import Sinks
from shardline.observe.summary import start_of
from shardline.optim import arrange, lr
from shardline.optim.kinds import kind
from shardline.plan.placement import STAGES, Placement, Stage
from shardline.runtime.environment import nodes_may_change
from shardline.runtime.modes import outside_modes
from shardline.runtime.process_group import init_distributed, make_current
from shardline.runtime.topology import Topology, discover
from shardline.sharding.admission import check_model
from shardline.sharding.build import (
    Layout,
    ParamGroups,
    group_parameters,
    lay_out,
    load_model,
    needs_full_params,
    new_optimizer,
    resting_stage,
    sample_optimizer,
    take_over,
)
from shardline.sharding.precision import Precision
from shardline.sharding.sharded_param import check_sharded_params
from shardline.sharding.unit import Unit
from shardline.watch import WatchSettings

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
    init_fn: Callable[[nn.Module], None] | Mapping[str, torch.Tensor] | None = None,
    engine_class: type[Engine] = Engine,
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
            initialisers have run, and writes its parameters in place. Or the values of the model's ``state_dict()``,
            or of a part of it, as a mapping that need not hold them, such as :func:`shardline.checkpoint.read` gives:
            rank 0 reads them, one at a time, and every rank gets its part. The other ranks give a mapping of the same
            names. What it does not name is initialised.
        engine_class: the class of the engine: :class:`shardline.Engine` or a subclass.

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
    check_sharded_params(model.parameters(), group)
    world = 1 if group is None else dist.get_world_size(group)
    settings = load_config(source, world, batches=training_data is not None, changing=nodes_may_change())
    comm = _connect(group, topology.device, settings)
    with (
        comm.watch.status.call("initialize"),
        ExitStack() as undo,
    ):  # where it fails, the model is as it was and may be given again
        undo.callback(comm.close)
        if isinstance(init_fn, Mapping):
            init_fn = StreamedWeights(model, init_fn, comm)
        engine = _make_engine(
            model, optimizer, model_parameters, training_data, lr_scheduler, collate_fn, init_fn, engine_class,
            settings, topology, comm, undo,
        )  # fmt: skip
        engine.checkpoints.resume()
        engine.events.emit(start_of(engine.global_steps, settings, comm, engine.summary()))
        undo.pop_all()
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _connect(group: dist.ProcessGroup | None, device: torch.device, settings: Config) -> Comm:
    """The communication of the ranks of ``group``, as configured. Collective."""
    watchdog, folder = settings.watchdog, settings.checkpoint.dir
    seconds = watchdog.timeout_seconds
    return Comm(
        group,
        device,
        None if seconds is None else timedelta(seconds=seconds),
        settings.communication_transport,
        WatchSettings(quiet_seconds=watchdog.quiet_seconds, folder=None if folder is None else Path(folder)),
    )


def _make_engine(
    model: nn.Module,
    optimizer: Optimizer | Callable[[Any], Optimizer] | None,
    model_parameters: Iterable[Any] | None,
    training_data: Any,
    lr_scheduler: LRScheduler | Callable[[Optimizer], Any] | None,
    collate_fn: Callable[[list[Any]], Any] | None,
    init_fn: Callable[[nn.Module], None] | None,
    engine_class: type[Engine],
    settings: Config,
    topology: Topology,
    comm: Comm,
    undo: ExitStack,
) -> Engine:
    """An engine on ``comm``. For each thing that is done, ``undo`` gets the function that reverts it."""
    _agree(comm, settings, training_data)
    everywhere = _Everywhere(comm)
    sinks = everywhere.run(partial(_sinks, settings, comm))
    _refuse_offload_param(settings, comm.device)
    precision = Precision.from_config(settings)
    again = settings.activation_checkpointing
    recomputed = recomputed_blocks(model, again.every) if again.enabled else []

    offload = Offload.from_config(settings, comm.device)
    training = _training(model, optimizer, model_parameters, settings, resting_stage(settings, offload), comm)
    _check_scheduler(lr_scheduler, training)
    loader = None if training_data is None else make_loader(training_data, settings, comm, collate_fn)
    if loader is not None:
        undo.callback(loader.close)

    made: list[weakref.ref[Engine]] = []  # weak: the units, which the engine owns, must not keep it alive

    layout = lay_out(
        model, settings, precision, comm, training.membership,
        param_aligned=training.needs_full_params, on_sealed_access=partial(_on_sealed_access, made), offload=offload,
    )  # fmt: skip

    # from here on the model changes

    undo.push(_Rollback(Origin(model, training.given), layout, everywhere, made).restore)
    fill = partial(meta.fill, model, init_fn=init_fn) if meta.is_on_meta(model) else None
    load_model(model, layout, precision, comm, fill)

    def finish() -> Engine:
        final = training.optimizer_of(layout)
        engine = engine_class(model, layout, final, training.membership, settings, precision, topology, comm)
        made.append(weakref.ref(engine))
        engine.lr_scheduler = _scheduler(lr_scheduler, final, settings)
        if loader is not None:
            engine.attach_loader(loader)
        if recomputed:
            offloaded = again.offload and comm.device.type != "cpu"
            engine.on_destroy(recompute_blocks(recomputed, offload=offloaded))
        return engine

    engine = everywhere.run(finish)
    engine.attach_sinks(sinks)
    for notice in _notices(engine, offloads=offload is not None, recomputes=bool(recomputed)):
        engine.events.emit(Notice(notice))
    return engine


def _sinks(settings: Config, comm: Comm) -> Sinks:
    """The configured sinks, on rank 0. Every rank checks that their packages are installed."""
    check_packages(settings)
    return Sinks(sinks_of(settings) if comm.data.rank == 0 else {}, settings)


def _on_sealed_access(made: Sequence[weakref.ref[Engine]], unit: Unit) -> bool:
    """A sealed parameter of ``unit`` is used: the engine decides, once it exists."""
    engine = made[0]() if made else None
    return engine is not None and engine.trainables.on_sealed_access(unit)


def _agree(comm: Comm, settings: Config, training_data: Any) -> None:
    """Check that ranks were given the same arguments, configuration and versions. Collective."""
    values = settings.to_dict()
    comm.messages.agree(
        {
            "the version of torch": torch.__version__,
            "the version of shardline": __version__,
            "whether the configuration has sinks": settings.is_observed,
            **{f"the configuration's {key}": value for key, value in values.items() if key not in OF_RANK_0},
            "the length of training_data": length(training_data),
        }
    )


class _Everywhere:
    """Runs work on every rank of ``comm``, and raises on all of them if it fails on one."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._sent: BaseException | None = None

    def run(self, work: Callable[[], T]) -> T:
        """What ``work``, which communicates with no rank, returns, if it raises on no rank. Collective.

        Raises:
            DisagreementError: where only other ranks raised.
        """
        try:
            result = work()
        except Exception as error:
            self._comm.messages.exchange(f"{type(error).__name__}: {text_of(error)}")
            self._sent = error
            raise
        for rank, failure in enumerate(self._comm.messages.exchange(None)):
            if failure is not None:
                raise DisagreementError(f"initialize failed on rank {rank}, and not on this one: {failure}")
        return result

    def has(self, error: BaseException) -> bool:
        alike = isinstance(error, ShardlineError) and not isinstance(error, LostRankError)
        return alike or error is self._sent or self._comm.data.size == 1


@dataclass(frozen=True)
class _Rollback:
    """Restores the model and its optimizer if ``initialize`` fails on every rank."""

    origin: Origin
    layout: Layout
    everywhere: _Everywhere
    made: list[weakref.ref[Engine]]

    def restore(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """What an exit stack calls at its end."""
        if error is None or not self.everywhere.has(error):  # the other ranks would not take part
            return
        self.origin.restore(self.layout, error)
        for engine in [each() for each in self.made]:
            if engine is not None:
                engine.destroy()


def _notices(engine: Engine, *, offloads: bool, recomputes: bool) -> Iterator[str]:
    """Notices about the machine and the configuration."""
    settings, on_host = engine.config, engine.comm.device.type == "cpu"
    zero = settings.zero_optimization
    yield from filter(None, (engine.topology.notice, engine.comm.notice, _advice(engine, engine.topology)))
    if settings.no_effect:
        yield "these configuration keys have no effect here: " + ", ".join(sorted(settings.no_effect))
    if zero.offload_optimizer.device == "cpu" and not offloads:
        yield "offload_optimizer has no effect: masters and optimizer state are in host memory"
    if zero.offload_param.device == "cpu":
        yield "offload_param has no effect: weights stay where the model computes"
    if recomputes and settings.activation_checkpointing.offload and on_host:
        yield "activation_checkpointing.offload has no effect: the model is in host memory"


def _advice(engine: Engine, topology: Topology) -> str | None:
    """A notice where gradients between hosts cost more than they must."""
    if topology.world_size == topology.local_world_size or engine.comm.data.size == 1 or engine.optimizer is None:
        return None
    larger = any(
        bucket.shard.stage.states is Placement.REPLICATED and bucket.grads.dtype.itemsize > bucket.plan.dtype.itemsize
        for unit in engine.trainables.layout.units
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
            f"sharded over the ranks. If the model fits, delete offload_param from the configuration."
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


@dataclass(frozen=True)
class _Training:
    """What is trained, and by what.

    Attributes:
        given: the optimizer that the user made.
        named: the section of the configuration that names one, where the user made none.
        groups: the param groups.
        membership: the group of each parameter that is trained, by first name; empty without an optimizer.
        needs_full_params: whether the optimizer must see whole parameters.
    """

    given: Optimizer | None
    named: OptimizerSection | None
    groups: ParamGroups
    membership: dict[str, int]
    needs_full_params: bool

    def optimizer_of(self, layout: Layout) -> Optimizer | None:
        """The optimizer over the runs of ``layout``, if there is one."""
        if self.given is not None:
            take_over(self.given, layout)
            return self.given
        return None if self.named is None else new_optimizer(self.named.type, self.named.params, self.groups, layout)


def _training(
    model: nn.Module,
    optimizer: Optimizer | Callable[[Any], Optimizer] | None,
    model_parameters: Iterable[Any] | None,
    settings: Config,
    stage: Stage,
    comm: Comm,
) -> _Training:
    """What the arguments of :func:`initialize` and the configuration say together."""
    given, groups = _optimizer_and_groups(model, optimizer, model_parameters, settings)
    membership = group_parameters(model, groups)
    named = settings.optimizer if given is None else None
    if named is not None:
        groups = arrange(named.type, model, groups)
        membership = group_parameters(model, groups)
    sample = given if named is None else sample_optimizer(named.type, named.params)
    if sample is None:
        return _Training(None, None, groups, {}, False)
    return _Training(given, named, groups, membership, needs_full_params(sample, stage, comm.data.size))


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


def _check_scheduler(given: Any, training: _Training) -> None:
    if given is not None and training.given is None and training.named is None:
        raise UsageError("an lr_scheduler was given without an optimizer. Give initialize an optimizer as well.")
    if _is_made(given) and getattr(given, "optimizer", training.given) is not training.given:
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
        rank=comm.data.rank,
        world_size=comm.data.size,
        seed=settings.seed if options.seed is None else options.seed,
        shuffle=options.shuffle,
        drop_last=options.drop_last,
        num_workers=options.num_workers,
        pin_memory=options.pin_memory,
        collate_fn=collate_fn,
        prefetch_factor=options.prefetch_factor,
        persistent_workers=options.persistent_workers,
    )
