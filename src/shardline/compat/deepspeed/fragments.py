"""Gradient, masters and optimizer state of one parameter: ``safe_get_full_*`` whole, ``safe_get_local_*`` of this rank.

Collective, both: all ranks call them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from shardline.engine import Engine
from shardline.engine.parameter_access import ParameterAccess
from shardline.engine.weights import engines_of
from shardline.errors import UsageError
from shardline.sharding.fragments import StateFragment


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


# -- this rank's elements ----------------------------------------------------------------------------------------------


def safe_get_local_fp32_param(param: nn.Parameter) -> Tensor:
    """The fp32 masters of the elements of ``param`` that this rank updates: 1-D, in the order in which they are stored.

    All ranks call these alike. In the order of the ranks, what they give is the whole parameter where it is sharded
    (stages 1 to 3); at stage 0 each has all of it. A rank has as many elements as lie in its shard: maybe none.

    Raises:
        UsageError: for a parameter that no engine trains.
    """
    return _join([piece.weight for piece in _pieces(param, "safe_get_local_fp32_param")], param)


def safe_get_local_grad(param: nn.Parameter) -> Tensor:
    """The gradient of these elements between backward and step: averaged over the ranks, unscaled.

    Raises:
        UsageError: for a parameter that no engine trains; where no backward gave a gradient.
    """
    return _join([_grad(piece) for piece in _pieces(param, "safe_get_local_grad")], param)


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor:
    """The state ``optim_state_key`` of these elements.

    Raises:
        UsageError: for a parameter that no engine trains; where there is no such state with an element for each.
    """
    pieces = _pieces(param, "safe_get_local_optimizer_state")
    return _join([_state(piece, optim_state_key) for piece in pieces], param)


def safe_set_local_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Give the masters of these elements the 1-D ``value``. Weights of another dtype follow in the next step.

    Raises:
        UsageError: as :func:`safe_get_local_fp32_param`; for another number of elements.
    """
    pieces = _pieces(param, "safe_set_local_fp32_param")
    _divide(value, [piece.weight for piece in pieces], "safe_set_local_fp32_param")


def safe_set_local_grad(param: nn.Parameter, value: Tensor) -> None:
    """Make the 1-D ``value`` the gradient of these elements.

    Raises:
        UsageError: as :func:`safe_get_local_grad`; for another number of elements.
    """
    _divide(value, [_grad(piece) for piece in _pieces(param, "safe_set_local_grad")], "safe_set_local_grad")


def safe_set_local_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Give the state ``optim_state_key`` of these elements the 1-D ``value``.

    Raises:
        UsageError: as :func:`safe_get_local_optimizer_state`; for another number of elements.
    """
    pieces = _pieces(param, "safe_set_local_optimizer_state")
    _divide(value, [_state(piece, optim_state_key) for piece in pieces], "safe_set_local_optimizer_state")


def _pieces(param: nn.Parameter, what: str) -> list[StateFragment]:
    return _needed(param, what).fragments()


def _grad(piece: StateFragment) -> Tensor:
    if piece.grad is None:
        raise UsageError(f"parameter {piece.name!r} has no gradient: no backward of this window has given one.")
    return piece.grad


def _state(piece: StateFragment, key: str) -> Tensor:
    found = piece.state.get(key)
    if not isinstance(found, Tensor) or found.numel() != piece.weight.numel():
        raise UsageError(f"parameter {piece.name!r} has no state {key!r} with an element for each of its own.")
    return found


def _join(parts: list[Tensor], param: nn.Parameter) -> Tensor:
    if len(parts) == 1:
        return parts[0].detach()
    return torch.cat(parts) if parts else param.new_empty(0, dtype=torch.float32)


def _divide(value: Tensor, parts: list[Tensor], what: str) -> None:
    own = sum(part.numel() for part in parts)
    if value.dim() != 1 or value.numel() != own:
        raise UsageError(
            f"deepspeed.utils.{what} was given a tensor of shape {tuple(value.shape)}. This rank has {own} elements of "
            f"the parameter: give a tensor of shape ({own},)."
        )
    start = 0
    with torch.no_grad():
        for part in parts:
            part.copy_(value[start : start + part.numel()])
            start += part.numel()


def _engine_of(param: nn.Parameter) -> Engine | None:
    return next((engine for engine, _ in engines_of([param])), None)


def _needed(param: nn.Parameter, what: str) -> ParameterAccess:
    engine = _engine_of(param)
    if engine is None or engine.optimizer is None:
        raise UsageError(f"{what} was given a parameter that no engine trains.")
    return engine.parameter(param)
