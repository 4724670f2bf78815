"""``deepspeed.zero``: models built under ``Init``, and parameters made whole by ``GatheredParameters``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ContextDecorator, ExitStack
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shardline.compat.deepspeed import table
from shardline.engine.weights import engines_of
from shardline.features.sharded import edited, shard_parameters, sharded_weights

__all__ = ["GatheredParameters", "Init", "ZeroParamStatus", "register_external_parameter"]


class ZeroParamStatus(Enum):
    """Whether a parameter of stage 3 is whole."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


def give_status() -> None:
    """Let every tensor say that it is whole, also what autograd saved of a parameter: clients ask before they read.

    What reads a sharded parameter in a forward gathers it, so nothing has to be gathered for it.
    """
    torch.Tensor.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]


class Init(ContextDecorator):
    """Within it models are sharded over the ranks as they are made; see :func:`shardline.sharded_weights`.

    A ``module`` that exists is sharded at once. Parameters stay in the dtype and on the device of their constructors.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        **others: Any,
    ) -> None:
        self._enabled = enabled
        self._held = ExitStack()
        if module is not None and enabled:
            shard_parameters(module.parameters())

    def __enter__(self) -> None:
        if self._enabled:
            self._held.enter_context(sharded_weights())

    def __exit__(self, *error: Any) -> bool | None:
        return self._held.__exit__(*error)


class GatheredParameters:
    """Within it ``params`` are whole; with ``modifier_rank`` what that rank changes is taken over everywhere.

    Those that were made outside of :class:`Init`, and have no engine, are whole already. Collective as DeepSpeed's.
    """

    def __init__(
        self,
        params: nn.Parameter | nn.Module | Iterable[nn.Parameter],
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        if isinstance(params, nn.Module):
            params = params.parameters()
        self._params: list[nn.Parameter] = [params] if isinstance(params, nn.Parameter) else list(params)
        self._rank, self._enabled = modifier_rank, enabled
        self._held = ExitStack()

    def __enter__(self) -> None:
        if self._enabled:
            self._held.enter_context(edited(self._params, self._rank))
            for engine, mine in engines_of(self._params):
                self._held.enter_context(engine.gathered_parameters(mine, write=self._rank is not None))

    def __exit__(self, *error: Any) -> bool | None:
        if error[0] is None and self._enabled and self._rank is not None:
            self._broadcast()
        return self._held.__exit__(*error)

    def _broadcast(self) -> None:
        """Give every rank what the modifying one has written. An engine takes rank 0's values over by itself."""
        if self._rank == 0 or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        for param in [param for _, mine in engines_of(self._params) for param in mine]:
            with torch.no_grad():
                value = param.detach().contiguous()
                dist.broadcast(value, src=self._rank)
                param.copy_(value)


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Nothing to do: a module that reads the parameter of another gathers it."""


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Nothing to do."""


_orig_torch_arange = torch.arange


def zero_wrapper_for_fp_tensor_constructor(fn: Callable[..., Any], target_fp_dtype: torch.dtype) -> Callable[..., Any]:
    """``fn``: constructors of tensors are not changed while a model is built."""
    return fn


def __getattr__(name: str) -> Any:
    return table.resolve("zero", name)
