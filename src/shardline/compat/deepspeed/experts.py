"""``deepspeed.moe``: Shardline's layer of experts, with the marks and param groups that scripts look for."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardline.errors import ModelError
from shardline.moe import MoE as _MoE
from shardline.moe.routing import Routing, route

__all__ = ["MoE"]

logger = logging.getLogger("shardline")

_GROUP = "ep_size_1"


class MoE(_MoE):
    """``shardline.moe.MoE``. Parameters of its experts have ``allreduce`` False and a ``group_name``."""

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
    ) -> None:
        if enable_expert_tensor_parallelism:
            raise ModelError("MoE was given enable_expert_tensor_parallelism: there is no tensor parallelism.")
        if use_tutel:
            logger.warning("deepspeed.moe.layer.MoE: use_tutel has no effect; tokens are moved by torch's own kernels.")
        super().__init__(
            hidden_size, expert, num_experts, ep_size, k, capacity_factor, eval_capacity_factor, min_capacity,
            use_residual, noisy_gate_policy, drop_tokens, use_rts, top2_2nd_expert_sampling,
        )  # fmt: skip
        self.ep_size, self.num_local_experts, self.use_residual = 1, num_experts, use_residual
        self.expert_group_name = _GROUP
        for param in self.experts.parameters():
            param.allreduce, param.group_name = False, _GROUP  # type: ignore[attr-defined]

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Nothing to do: there are no groups to make."""


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """Whether ``m`` has such a layer, and the number of experts of the first one."""
    found = next((each for each in m.modules() if isinstance(each, _MoE)), None)
    return found is not None, 0 if found is None else found.num_experts


def is_moe_param(param: Tensor) -> bool:
    """Whether ``param`` is one of an expert."""
    return not getattr(param, "allreduce", True)


def is_moe_param_group(param_group: dict[str, Any]) -> bool:
    """Whether these are parameters of experts."""
    return bool(param_group.get("moe", False))


def split_params_into_shared_and_expert_params(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those of no expert, and those of experts."""
    return [each for each in params if not is_moe_param(each)], [each for each in params if is_moe_param(each)]


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: dict[str, Any] | Iterable[dict[str, Any]], max_group_size: float | None = None
) -> list[dict[str, Any]]:
    """``param_groups`` with the parameters of experts in groups of their own, of the same options.

    ``max_group_size`` has no effect: how large buckets are does not depend on param groups.
    """
    groups = [param_groups] if isinstance(param_groups, dict) else list(param_groups)
    found = [{**group, "params": list(group["params"])} for group in groups]
    for group in list(found):
        shared, experts = split_params_into_shared_and_expert_params(group["params"])
        if experts:
            group["params"] = shared
            found.append({**group, "params": experts, "name": _GROUP, "moe": True})
    return found


def configure_moe_param_groups(model_parameters: list[Any]) -> list[dict[str, Any]]:
    """The param groups of parameters, or of param groups."""
    if model_parameters and isinstance(model_parameters[0], dict):
        return split_params_into_different_moe_groups_for_optimizer(model_parameters)
    return split_params_into_different_moe_groups_for_optimizer({"params": model_parameters})


def top1gating(
    logits: Tensor,
    capacity_factor: float,
    min_capacity: int,
    used_token: Tensor | None = None,
    noisy_gate_policy: str | None = None,
    drop_tokens: bool = True,
    use_rts: bool = True,
    ep_group: Any = None,
    use_tutel: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, the weights and the choices as (tokens, experts, capacity), and the tokens that chose each expert."""
    return _dense(
        route(
            logits.float(),
            1,
            factor=float(capacity_factor),
            minimum=int(min_capacity),
            drop=drop_tokens,
            used=used_token,
            sample=noisy_gate_policy == "RSample",
            random_drop=use_rts,
        )
    )


def top2gating(
    logits: Tensor,
    capacity_factor: float,
    min_capacity: int,
    drop_tokens: bool = True,
    ep_group: Any = None,
    top2_2nd_expert_sampling: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for two experts of each token."""
    return _dense(
        route(
            logits.float(),
            2,
            factor=float(capacity_factor),
            minimum=int(min_capacity),
            drop=drop_tokens,
            sample=top2_2nd_expert_sampling,
        )
    )


def _dense(routing: Routing) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    experts = F.one_hot(routing.expert, routing.counts.numel()).to(routing.weight.dtype)
    slots = F.one_hot(routing.slot, max(routing.capacity, int(routing.slot.max())) + 1)[..., : routing.capacity]
    combine = torch.einsum("tk,tke,tks->tes", routing.weight, experts, slots.to(routing.weight.dtype))
    return routing.loss, combine, combine.bool(), routing.counts
