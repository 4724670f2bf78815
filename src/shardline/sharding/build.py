"""From a model and its optimizer to units: the layout, the first values, and the optimizer on this rank's runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardline.comm import DONE, Comm
from shardline.config import Config
from shardline.errors import ModelError, OptimizerError
from shardline.optim import build as build_optimizer
from shardline.optim import kind, prepare, replace_params
from shardline.plan import Entry, ModuleSpec, ParamSpec, Plan, make_plan
from shardline.plan.describe import chosen_units, describe_modules, describe_params, first_names
from shardline.plan.placement import STAGES, Placement, Stage
from shardline.sharding.averages import Averages
from shardline.sharding.bucket import Bucket, RunTensors
from shardline.sharding.buffer import BufferPool, view
from shardline.sharding.fragments import ParamState, collect_states, full_weights, put_states
from shardline.sharding.gradient import drop_grads
from shardline.sharding.host import HostMemory
from shardline.sharding.precision import Precision
from shardline.sharding.sharded_param import sharded_param_of
from shardline.sharding.unit import Unit

__all__ = [
    "Fill",
    "Layout",
    "ParamGroups",
    "ParamStore",
    "group_parameters",
    "lay_out",
    "lay_out_again",
    "load_model",
    "needs_full_params",
    "new_optimizer",
    "resting_stage",
    "sample_optimizer",
    "take_over",
]

ParamGroups = list[dict[str, Any]]


class ParamStore(Protocol):
    """The values of a model's parameters, by first name, while the model is loaded."""

    def store(self, name: str) -> None:
        """Store the values of a parameter, which is whole now. Rank 0's win. Collective."""

    def put(self, name: str, start: int, elements: Tensor) -> None:
        """Store ``elements`` (1-D, any float dtype), from the parameter's element ``start`` on in storage order."""

    def fetch(self, name: str) -> Tensor:
        """The stored values of a parameter, whole, in its shape, in any dtype and on any device. Collective."""


Fill = Callable[[dict[nn.Parameter, str], ParamStore], None]
"""Gives a model on ``meta`` its values: called with the first name of every parameter, and where values are stored."""


@dataclass
class Layout:
    """How one model lies on this rank.

    Attributes:
        plan: the pure value.
        params: the model's parameters by first name.
        units: the plan's units at run time.
        modules: what the plan was made from, for making another.
        pool, offload: what the units borrow buffers from, and what carries their states to host memory if it does.
    """

    plan: Plan
    params: dict[str, nn.Parameter]
    units: list[Unit]
    modules: list[ModuleSpec]
    pool: BufferPool
    offload: HostMemory | None = None

    def where(self, name: str) -> tuple[Unit, Bucket, Entry]:
        """The unit, bucket and entry of the parameter whose first name is ``name``."""
        unit_plan, bucket_plan, entry = self.plan.where(name)
        unit = self.units[unit_plan.index]
        return unit, unit.buckets[unit_plan.buckets.index(bucket_plan)], entry

    @cached_property
    def runs(self) -> list[RunTensors]:
        """This rank's runs in plan order: the tensors that the optimizer holds."""
        return [run for unit in self.units for bucket in unit.trainable for run in bucket.runs()]


def group_parameters(model: nn.Module, groups: ParamGroups) -> dict[str, int]:
    """The param group of every parameter in ``groups``, by its first name in ``model``.

    Raises:
        OptimizerError: for a parameter that is in two groups, or not in the model.
    """
    names = {param: aliases[0] for param, aliases in first_names(model).items()}
    found: dict[str, int] = {}
    for index, group in enumerate(groups):
        for param in group["params"]:
            name = names.get(param)
            if name is None:
                raise OptimizerError(
                    f"param group {index} holds a tensor of shape {tuple(param.shape)} that is not a parameter of the "
                    f"model. The engine trains the model it is given: make it a parameter of the model, or leave it to "
                    f"an optimizer of your own."
                )
            if name in found:
                raise OptimizerError(f"parameter {name!r} is in param groups {found[name]} and {index}; list it once.")
            found[name] = index
    return found


def lay_out(
    model: nn.Module,
    config: Config,
    precision: Precision,
    comm: Comm,
    groups: Mapping[str, int],
    *,
    param_aligned: bool,
    on_sealed_access: Callable[[Unit], bool],
    offload: HostMemory | None = None,
) -> Layout:
    """Plan ``model`` and make its units, still empty. Ranks compare what they planned.

    Raises:
        DisagreementError: if ranks hold different models.
        ModelError: for a parameter that cannot lie in a flat buffer.
    """
    specs, params = describe_params(model, precision, groups)
    modules = describe_modules(model)
    plan = _plan(specs, modules, config, precision, comm, offload, param_aligned=param_aligned)
    comm.messages.agree(
        {
            "the number of parameters": len(specs),
            **{f"parameter {spec.name!r}": [list(spec.shape), str(spec.dtype), spec.group] for spec in specs},
            "the layout of the model": plan.fingerprint,
        }
    )
    pool = BufferPool(comm.device, comm.wait_for_readers, _travelling_bytes(plan, precision))
    units = _units(plan, params, config, precision, comm, pool, on_sealed_access, offload)
    return Layout(plan, params, units, modules, pool, offload)


def _travelling_bytes(plan: Plan, precision: Precision) -> set[int]:
    """The sizes of whole buckets, as weights and as gradients."""
    return {
        bucket.size * dtype.itemsize
        for unit in plan.units
        for bucket in unit.buckets
        for dtype in (bucket.dtype, precision.grad_dtype(bucket.dtype), precision.reduce or bucket.dtype)
    }


def _plan(
    specs: Sequence[ParamSpec],
    modules: Sequence[ModuleSpec],
    config: Config,
    precision: Precision,
    comm: Comm,
    offload: HostMemory | None,
    *,
    param_aligned: bool,
) -> Plan:
    dtypes = {spec.dtype for spec in specs} if offload is None else set()  # to host memory a gradient is copied
    zero = config.zero_optimization
    leaf = zero.leaf_module
    return make_plan(
        specs,
        modules,
        comm.shard.size,
        min_numel=zero.unit_min_numel,
        max_numel=zero.unit_max_numel,
        chosen=chosen_units(modules, leaf.classes, leaf.names, leaf.name_suffixes),
        param_aligned=param_aligned,
        kept_grads={dtype for dtype in dtypes if precision.grad_dtype(dtype) == dtype},
    )


def _units(
    plan: Plan,
    params: dict[str, nn.Parameter],
    config: Config,
    precision: Precision,
    comm: Comm,
    pool: BufferPool,
    on_sealed_access: Callable[[Unit], bool],
    offload: HostMemory | None,
) -> list[Unit]:
    return [
        Unit(unit, params, _stage_of(unit.numel, config, offload), comm, pool, precision, on_sealed_access, offload)
        for unit in plan.units
    ]


def _stage_of(numel: int, config: Config, offload: HostMemory | None) -> Stage:
    """How a unit of ``numel`` elements rests: a small one keeps its weights."""
    stage = resting_stage(config, offload)
    is_small = numel < config.zero_optimization.stage3_param_persistence_threshold
    return stage.keeping_weights if is_small else stage


def resting_stage(config: Config, offload: HostMemory | None) -> Stage:
    """The configured stage; but states in host memory are always sharded.

    The ranks of one host would keep, and update, as many copies of them in the same memory.
    """
    stage = STAGES[config.zero_optimization.stage]
    return stage if offload is None else stage.sharding_states


def load_model(
    model: nn.Module,
    layout: Layout,
    precision: Precision,
    comm: Comm,
    fill: Fill | None = None,
) -> None:
    """Move the model's values into the units, unit by unit, and its buffers to the device.

    Rank 0's win on every rank. If some of the model is on ``meta``, ``fill`` gives it its values. Parameters that are
    sharded already are moved a range at a time, from the rank that has it.

    Raises:
        ModelError: for a parameter or buffer that nothing gives a value, or another one than its constructor did.
    """
    values = _UnitStore(layout, comm)
    before = DONE  # rank 0 packs the next bucket while the others still copy this one
    for unit in layout.units:
        unit.allocate()
        for bucket in unit.buckets:
            drop_grads(bucket.params)
            if any(param.is_meta or sharded_param_of(param) is not None for param in bucket.params):
                values.store_all(bucket)
            else:
                work = bucket.weights.load(bucket.params)
                before.wait()
                before = work
            if fill is None:
                for entry in bucket.plan.entries:
                    unit.seal_or_bind(bucket, entry)
    before.wait()
    if fill is not None:
        fill({param: name for name, param in layout.params.items()}, values)
        values.forget()
        for name in layout.params:
            unit, bucket, entry = layout.where(name)
            unit.seal_or_bind(bucket, entry)
    for unit in layout.units:
        unit.finish_load()
    layout.pool.clear()
    _move_buffers(model, precision, comm)


class _UnitStore:
    """The :class:`ParamStore` of units. The bucket that was read last is kept whole: neighbours are read in turn."""

    def __init__(self, layout: Layout, comm: Comm) -> None:
        self._layout, self._comm = layout, comm
        self._held: tuple[Bucket, Tensor] | None = None

    def store_all(self, bucket: Bucket) -> None:
        """Store the values of ``bucket``'s parameters, whole or sharded. Those on ``meta`` have none."""
        for param, entry in zip(bucket.params, bucket.plan.entries, strict=True):
            sharded = sharded_param_of(param)
            if sharded is not None:
                sharded.broadcast_ranges(self._comm, partial(bucket.weights.store_range, entry))
            elif not param.is_meta:
                self.store(entry.param.name)

    def store(self, name: str) -> None:
        _, bucket, entry = self._layout.where(name)
        value = self._layout.params[name].detach()
        self._comm.messages.broadcast([value])
        self._comm.wait_for_readers()  # all have read what was sent, so it is freed before the next
        bucket.weights.store(entry, value)
        if self._held is not None and self._held[0] is bucket:
            view(self._held[1], entry).copy_(value)

    def put(self, name: str, start: int, elements: Tensor) -> None:
        _, bucket, entry = self._layout.where(name)
        self.forget()
        bucket.weights.store_range(entry, start, elements)

    def fetch(self, name: str) -> Tensor:
        unit, bucket, entry = self._layout.where(name)
        if self._held is None or self._held[0] is not bucket:
            self.forget()
            self._held = bucket, bucket.weights.gather_authoritative(unit.index)
        return view(self._held[1], entry)

    def forget(self) -> None:
        """Free the bucket that was read last."""
        self._held = None


def _move_buffers(model: nn.Module, precision: Precision, comm: Comm) -> None:
    """Bring the model's buffers to the device, and rank 0's values into them. What shared memory goes on doing so.

    Raises:
        ModelError: for buffers of several dtypes in the same memory.
    """
    held = dict.fromkeys(buffer for module in model.modules() for buffer in module._buffers.values())
    sharing: dict[int, list[Tensor]] = {}
    for buffer in held:
        if buffer is not None:
            sharing.setdefault(buffer.untyped_storage()._cdata, []).append(buffer)
    moved: dict[Tensor | None, Tensor | None] = {None: None}  # by object: one that two modules hold stays one
    sent: list[Tensor] = []
    for together in sharing.values():
        first = together[0]
        dtype = precision.buffers if precision.buffers and first.is_floating_point() else first.dtype
        if len(together) == 1:
            sent.append(first.to(comm.device, dtype).contiguous())
            moved[first] = sent[-1]
            continue
        if any(buffer.dtype != first.dtype for buffer in together):
            name = next(name for name, buffer in model.named_buffers() if buffer is first)
            raise ModelError(f"buffer {name!r} shares memory with one of another dtype. Give each a copy (.clone()).")
        memory = torch.empty(0, dtype=first.dtype, device=first.device).set_(first.untyped_storage())
        sent.append(memory.to(comm.device, dtype))
        for buffer in together:
            moved[buffer] = sent[-1].as_strided(buffer.shape, buffer.stride(), buffer.storage_offset())
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = moved[buffer]
    comm.messages.broadcast(sent)


def needs_full_params(optimizer: Optimizer, stage: Stage, world_size: int) -> bool:
    """Whether ``optimizer`` must see whole parameters in their own shapes.

    Raises:
        OptimizerError: if it must see all parameters together and cannot.
    """
    found = kind(optimizer)
    if found == "global" and stage.states is Placement.SHARDED and world_size > 1:
        raise OptimizerError(
            f"{type(optimizer).__name__} needs all parameters on one rank for its step, and stage {stage.number} "
            f"shards them. Use stage 0 without offload_optimizer, or an optimizer that works on each element or each "
            f"parameter."
        )
    return found != "elementwise"


def take_over(optimizer: Optimizer, layout: Layout) -> None:
    """Give ``optimizer`` this rank's runs instead of the model's parameters."""
    runs = layout.runs
    replace_params(
        optimizer,
        [[run.param for run in runs if run.run.group == index] for index in range(len(optimizer.param_groups))],
    )
    prepare(optimizer)


def sample_optimizer(name: str, params: Mapping[str, Any]) -> Optimizer:
    """The configured optimizer on a dummy tensor, to learn what it needs before the layout is made."""
    return build_optimizer(name, params, [{"params": [torch.zeros(8, 8)]}])


def new_optimizer(name: str, params: Mapping[str, Any], groups: ParamGroups, layout: Layout) -> Optimizer:
    """The configured optimizer on this rank's runs, with the options of the user's param groups."""
    runs = layout.runs
    optimizer = build_optimizer(
        name,
        params,
        [
            {**group, "params": [run.param for run in runs if run.run.group == index]}
            for index, group in enumerate(groups)
        ],
    )
    prepare(optimizer)
    return optimizer


def lay_out_again(
    layout: Layout,
    config: Config,
    precision: Precision,
    comm: Comm,
    optimizer: Optimizer,
    groups: Mapping[str, int],
    frozen_states: dict[str, ParamState],
    averages: Averages,
    on_sealed_access: Callable[[Unit], bool],
    *,
    param_aligned: bool,
    state_steps: Mapping[str, int] | None = None,
) -> Layout:
    """Lay the model out again after parameters were frozen, unfrozen or added to the optimizer. Collective.

    Weights, masters and optimizer state move by name, and pass whole through every rank; the state of frozen parameters
    is kept in ``frozen_states``. ``state_steps`` says how many steps each parameter's state has seen, where the states
    are still to be loaded.
    """
    states: dict[str, ParamState] = dict(frozen_states)
    weights: dict[str, Tensor] = {}
    runs = layout.runs
    for unit in layout.units:
        weights.update({entry.param.name: tensor.clone() for entry, tensor in full_weights(unit)})
        states.update(collect_states(unit, runs, optimizer))
    averaged = averages.collect(layout.units)
    if state_steps is None:
        state_steps = {name: state.steps for name, state in states.items()}
    specs = [
        replace(
            spec,
            group=groups.get(spec.name) if layout.params[spec.name].requires_grad else None,
            state_steps=state_steps.get(spec.name, 0),
        )
        for spec in layout.plan.params
    ]
    specs = _in_order(specs, layout.params)
    plan = _plan(specs, layout.modules, config, precision, comm, layout.offload, param_aligned=param_aligned)
    comm.messages.agree({"the parameters that are trained": plan.fingerprint})
    units = _units(plan, layout.params, config, precision, comm, layout.pool, on_sealed_access, layout.offload)
    made = Layout(plan, layout.params, units, layout.modules, layout.pool, layout.offload)
    for unit in made.units:
        unit.allocate()
        for bucket in unit.buckets:
            for entry in bucket.plan.entries:
                bucket.weights.store(entry, weights.pop(entry.param.name))
        unit.finish_load()
    averages.put(made.units, averaged)
    new_runs = made.runs
    for index, group in enumerate(optimizer.param_groups):
        group["params"] = [run.param for run in new_runs if run.run.group == index]
    optimizer.state.clear()
    trained = {spec.name for spec in specs if spec.trainable}
    put_states(new_runs, {name: state for name, state in states.items() if name in trained}, optimizer)
    frozen_states.clear()
    frozen_states.update({name: state for name, state in states.items() if name not in trained})
    prepare(optimizer)
    return made


def _in_order(specs: Iterable[ParamSpec], params: Mapping[str, nn.Parameter]) -> list[ParamSpec]:
    """Definition order, which is that of the layout's parameters."""
    by_name = {spec.name: spec for spec in specs}
    return [by_name[name] for name in params]
