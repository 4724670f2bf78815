"""Masters and optimizer state of one parameter, whole: ``safe_get_full_*`` and ``safe_set_full_*``. Collective."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from torch import Tensor, nn

from shardline.compat.deepspeed.engine import DeepSpeedEngine, engines_of
from shardline.engine.parameter_access import ParameterAccess
from shardline.errors import UsageError

_LOCAL = "a rank does not hold 1/world of each parameter, but whole ones and fragments: use the full variant"


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """The fp32 master of ``param``, whole, in its shape; None for a parameter without an engine."""
    engine = _engine_of(param)
    return None if engine is None else engine.parameter(param).full_master().float()


def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Give the master of ``param``, and the weight, the whole ``value``, the same on every rank."""
    _needed(param, "safe_set_full_fp32_param").set_full_master(value)


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """The state ``optim_state_key`` of ``param``, whole, in its shape; None where there is none."""
    engine = _engine_of(param)
    if engine is None or engine.optimizer is None:
        return None
    return engine.parameter(param).full_state(optim_state_key)


def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Give that state the whole ``value``, the same on every rank.

    Raises:
        UsageError: where there is no such state yet.
    """
    _needed(param, "safe_set_full_optimizer_state").set_full_state(optim_state_key, value)


def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """The gradient of ``param`` between backward and step, averaged over the ranks and unscaled, whole, in its shape.

    A copy, in the dtype in which gradients are added up. None where no backward gave any.
    """
    engine = _engine_of(param)
    if engine is None:
        return param.grad
    return engine.parameter(param).full_grad() if param.requires_grad and engine.optimizer is not None else None


def safe_set_full_grad(param: nn.Parameter, value: Tensor) -> None:
    """Make the whole ``value``, the same on every rank, that gradient."""
    _needed(param, "safe_set_full_grad").set_full_grad(value)


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


def _engine_of(param: nn.Parameter) -> DeepSpeedEngine | None:
    return next((engine for engine, _ in engines_of([param])), None)


def _needed(param: nn.Parameter, what: str) -> ParameterAccess:
    engine = _engine_of(param)
    if engine is None or engine.optimizer is None:
        raise UsageError(f"{what} was given a parameter that no engine trains.")
    return engine.parameter(param)
