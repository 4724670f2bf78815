"""``deepspeed.zero``: models built under ``Init``, and parameters made whole by ``GatheredParameters``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import ContextDecorator, ExitStack
from enum import Enum
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.hooks import RemovableHandle

from shardline.compat.deepspeed import table
from shardline.compat.deepspeed.engine import engines_of

__all__ = ["GatheredParameters", "Init", "ZeroParamStatus", "register_external_parameter"]

logger = logging.getLogger("shardline")

_BUILT = "_built_under_zero_init"
"""On parameters of which DeepSpeed would hold a shard before there is an engine: edits in them are shared."""


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
    """Builds a model that ``initialize`` will shard. It is whole on every rank until then, which is said once."""

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
        self._hook: RemovableHandle | None = None
        for param in () if module is None or not enabled else module.parameters():
            setattr(param, _BUILT, True)

    def __enter__(self) -> None:
        if self._enabled:
            _say_whole()
            self._hook = register_module_parameter_registration_hook(_note)

    def __exit__(self, *error: object) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _note(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
    if param is not None:
        setattr(param, _BUILT, True)


@cache
def _say_whole() -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.warning(
            "deepspeed.zero.Init: the model is built whole on every rank, and divided by deepspeed.initialize. "
            "shardline.empty_weights() builds one that is never whole."
        )


class GatheredParameters:
    """Within it ``params`` are whole; with ``modifier_rank`` what that rank changes is taken over everywhere.

    Parameters without an engine are whole already. Collective where DeepSpeed's is.
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
            for engine, mine in engines_of(self._params):
                self._held.enter_context(engine.gathered_parameters(mine, write=self._rank is not None))

    def __exit__(self, *error: Any) -> bool | None:
        if error[0] is None and self._enabled and self._rank is not None:
            self._broadcast()
        return self._held.__exit__(*error)

    def _broadcast(self) -> None:
        """Give every rank what the modifying one has written."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        managed = {id(param) for _, mine in engines_of(self._params) for param in mine}
        for param in self._params:
            # An engine takes rank 0's values over by itself.
            if self._rank != 0 if id(param) in managed else hasattr(param, _BUILT):
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
