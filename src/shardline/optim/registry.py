"""Optimizers by the names of a configuration: which class a name means, with which parameters, fused where possible."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from shardline.errors import ConfigError
from shardline.names import call, nearest
from shardline.optim.amp import FUSED
from shardline.optim.lamb import Lamb
from shardline.optim.lion import Lion
from shardline.optim.muon import MuonAdamW, split_groups

__all__ = ["arrange", "build"]

# DeepSpeed's names, in any case.
NAMES: dict[str, type[Optimizer]] = {
    "Adam": Adam,
    "AdamW": AdamW,
    "SGD": SGD,
    "Adagrad": Adagrad,
    "Lion": Lion,
    "Lamb": Lamb,
    "Muon": MuonAdamW,
}
UNSUPPORTED = ("OneBitAdam", "ZeroOneAdam", "OneBitLamb", "MuAdam", "MuAdamW", "MuSGD")

# Parameters of DeepSpeed's kernels that choose an implementation.
WITHOUT_EFFECT = frozenset({"torch_adam", "legacy_fusion", "set_grad_none"})
# Parameters of DeepSpeed's kernels of which one value is what Shardline does anyway.
FIXED: dict[type[Optimizer], dict[str, Any]] = {
    Adam: {"bias_correction": True, "fp32_optimizer_states": True},
    Lamb: {"amsgrad": False},
    MuonAdamW: {"fp32_optimizer_states": True, "per_head_muon": False},
}


def build(name: str, params: Mapping[str, Any] | None, param_groups: Sequence[dict[str, Any]]) -> Optimizer:
    """The optimizer ``name`` over ``param_groups``, dicts with ``params``, a list of tensors, and options of the group.

    ``name`` is Adam, AdamW, SGD, Adagrad, Lion, Lamb or Muon in any case, or exactly a class of ``torch.optim``. As in
    DeepSpeed, Adam is AdamW unless ``adam_w_mode`` is false, and the weight decay of both is 0 unless given; Muon is
    `MuonAdamW`, for which `arrange` makes the groups. The fused kernel is taken where torch has one for every tensor,
    unless ``fused`` or ``foreach`` is given.

    Raises `ConfigError` for an unknown name or parameter (naming the nearest) and for a value out of range.
    """
    given = dict(params or {})
    if "max_grad_norm" in given:
        raise ConfigError(
            "optimizer.params.max_grad_norm is not an optimizer parameter: set gradient_clipping at the top "
            "level of the configuration instead."
        )
    kind = _class_of(name)
    also: set[str] = set()
    if kind in (Adam, AdamW):
        kind = _adam_mode(kind, given)
        also = {"adam_w_mode", *WITHOUT_EFFECT, *FIXED[Adam]}
        given = {"weight_decay": 0.0} | given
    for fixed, value in FIXED.get(Adam if kind is AdamW else kind, {}).items():
        found = given.pop(fixed, value)
        if found != value:
            raise ConfigError(f"optimizer.params.{fixed} is {found!r}; for {name} only {value!r} is supported.")
    if issubclass(kind, Adam | Adagrad | Lamb | Lion | MuonAdamW):
        given = {key: value for key, value in given.items() if key not in WITHOUT_EFFECT}
    if kind is MuonAdamW:
        given.pop("ns_method", None)  # ways to compute the same iteration, of which torch has one
    if "betas" in given:
        given["betas"] = _betas(given["betas"])
    kernel = AdamW if kind is MuonAdamW else kind
    if _wants_fused(kernel, given) and _can_fuse(kernel, (t for group in param_groups for t in group["params"])):
        given["fused"] = True
    return call(kind, list(param_groups), what=f"optimizer {name}", params=given, also=also)


def arrange(name: str, model: nn.Module, param_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``param_groups`` of ``model`` as the optimizer ``name`` wants them: for Muon see `split_groups`.

    Raises `ConfigError` for an unknown name, and for what Muon cannot take.
    """
    return split_groups(model, param_groups) if _class_of(name) is MuonAdamW else param_groups


def _class_of(name: str) -> type[Optimizer]:
    own = {one.casefold(): kind for one, kind in NAMES.items()}
    if name.casefold() in own:
        return own[name.casefold()]
    if name.casefold() in {one.casefold() for one in UNSUPPORTED}:
        raise ConfigError(f"optimizer.type {name!r} is one of DeepSpeed's and not supported. Use: {', '.join(NAMES)}.")
    theirs = {
        one: kind
        for one, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
    }
    if name in theirs:
        return theirs[name]
    known = sorted({*NAMES, *theirs})
    raise ConfigError(
        f"optimizer.type is {name!r}, which is not a known optimizer.{nearest(name, known)} Known: {', '.join(known)}. "
        "Any other can be passed to initialize as an instance."
    )


def _adam_mode(kind: type[Optimizer], given: dict[str, Any]) -> type[Optimizer]:
    """AdamW is always decoupled; Adam is too, unless ``adam_w_mode`` is false."""
    decoupled = given.pop("adam_w_mode", True)
    return Adam if kind is Adam and not decoupled else AdamW


def _betas(betas: Any) -> Any:
    # JSON has lists, and 0 for 0.0; torch wants a tuple of floats. Anything else is left for its error message.
    if isinstance(betas, list | tuple) and all(isinstance(beta, int | float) for beta in betas):
        return tuple(float(beta) for beta in betas)
    return betas


def _wants_fused(kind: type[Optimizer], given: Mapping[str, Any]) -> bool:
    chosen = any(given.get(key) is not None for key in ("fused", "foreach"))
    return kind in FUSED and not chosen and not given.get("differentiable")


def _can_fuse(kind: type[Optimizer], tensors: Iterable[Tensor]) -> bool:
    return all(t.is_floating_point() and t.device.type in FUSED[kind] for t in tensors)
