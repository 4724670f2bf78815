"""Masters and optimizer state of one parameter, whole: ``safe_get_full_*`` and ``safe_set_full_*``. Collective."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from shardline.compat.deepspeed.engine import DeepSpeedEngine, engines_of
from shardline.errors import UsageError
from shardline.sharding.buffer import flat
from shardline.sharding.fragments import collect_states, full_weights, local_fragments
from shardline.sharding.unit import Unit

_LOCAL = "a rank does not hold 1/world of each parameter, but whole ones and fragments: use the full variant"


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """The fp32 master of ``param``, whole, in its shape; None for a parameter without an engine."""
    found = _engine_of(param)
    if found is None:
        return None
    engine, name = found
    copy = None
    for entry, tensor in full_weights(_unit_of(engine, name)):  # to its end: each bucket is a collective
        if entry.param.name == name:
            copy = tensor.detach().float().clone()  # the next one may be gathered into the same memory
    return copy


def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Give the master of ``param``, and the weight, the whole ``value``, the same on every rank."""
    engine, name = _needed(param, "safe_set_full_fp32_param")
    with engine.gathered_parameters([param], write=True), torch.no_grad():
        param.copy_(value)
    stored = _as_stored(engine, param, value)
    for piece in _pieces(engine, name):
        piece.weight.copy_(stored[piece.start : piece.stop])


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """The state ``optim_state_key`` of ``param``, whole, in its shape; None where there is none."""
    found = _engine_of(param)
    if found is None:
        return None
    engine, name = found
    if engine.optimizer is None:
        return None
    unit = _unit_of(engine, name)
    state = collect_states(unit, engine.trainables.layout.runs, engine.optimizer)
    values = state[name].tensors.get(optim_state_key) if name in state else None
    return None if values is None else values.as_strided(param.shape, _strides(engine, param)).contiguous()


def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Give that state the whole ``value``, the same on every rank.

    Raises:
        UsageError: where there is no such state yet.
    """
    engine, name = _needed(param, "safe_set_full_optimizer_state")
    stored = _as_stored(engine, param, value)
    for piece in _pieces(engine, name):
        state = piece.state.get(optim_state_key)
        if not isinstance(state, Tensor):
            raise UsageError(f"parameter {name!r} has no optimizer state {optim_state_key!r} before the first step.")
        state.copy_(stored[piece.start : piece.stop])


def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """The gradient of ``param`` between backward and step, averaged over the ranks and unscaled, whole, in its shape.

    A copy, in the dtype in which gradients are added up. None where no backward gave any.
    """
    found = _engine_of(param)
    if found is None:
        return param.grad
    engine, name = found
    return engine.window_grads.full(name) if param.requires_grad and engine.optimizer is not None else None


def safe_set_full_grad(param: nn.Parameter, value: Tensor) -> None:
    """Make the whole ``value``, the same on every rank, that gradient."""
    engine, name = _needed(param, "safe_set_full_grad")
    engine.window_grads.put(name, value)


def safe_update_full_grad_vectorized(params: Iterable[nn.Parameter], update_func: Callable[..., Tensor]) -> None:
    """Replace the gradients of ``params`` by ``update_func(gradient, parameter)``, one after the other."""
    for param in params:
        if (grad := safe_get_full_grad(param)) is not None:
            safe_set_full_grad(param, update_func(grad, param))


def _refuse(name: str, why: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> NoReturn:
        raise UsageError(f"deepspeed.utils.{name} is not offered by Shardline's stand-in: {why}.")

    return call


safe_get_local_fp32_param = _refuse("safe_get_local_fp32_param", _LOCAL)
safe_get_local_grad = _refuse("safe_get_local_grad", _LOCAL)
safe_get_local_optimizer_state = _refuse("safe_get_local_optimizer_state", _LOCAL)
safe_set_local_fp32_param = _refuse("safe_set_local_fp32_param", _LOCAL)
safe_set_local_grad = _refuse("safe_set_local_grad", _LOCAL)
safe_set_local_optimizer_state = _refuse("safe_set_local_optimizer_state", _LOCAL)


def _engine_of(param: nn.Parameter) -> tuple[DeepSpeedEngine, str] | None:
    for engine, _ in engines_of([param]):
        return engine, next(name for name, each in engine.module.named_parameters() if each is param)
    return None


def _needed(param: nn.Parameter, what: str) -> tuple[DeepSpeedEngine, str]:
    found = _engine_of(param)
    if found is None or found[0].optimizer is None:
        raise UsageError(f"{what} was given a parameter that no engine trains.")
    return found


def _unit_of(engine: DeepSpeedEngine, name: str) -> Unit:
    engine.trainables.adopt_edits()
    for unit in engine.trainables.layout.units:
        if any(entry.param.name == name for bucket in unit.plan.buckets for entry in bucket.entries):
            return unit
    raise AssertionError(name)


def _pieces(engine: DeepSpeedEngine, name: str) -> list[Any]:
    if engine.optimizer is None:
        return []
    runs = engine.trainables.layout.runs
    return [each for each in local_fragments(runs, engine.optimizer) if each.name == name]


def _as_stored(engine: DeepSpeedEngine, param: nn.Parameter, value: Tensor) -> Tensor:
    """The elements of ``value`` in the order in which those of ``param`` are stored, 1-D, on the same device."""
    strides = _strides(engine, param)
    return flat(torch.empty_strided(value.shape, strides, dtype=value.dtype, device=param.device).copy_(value))


def _strides(engine: DeepSpeedEngine, param: nn.Parameter) -> tuple[int, ...]:
    with engine.gathered_parameters([param]):
        return param.stride()
