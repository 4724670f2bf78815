"""The dtypes of weights, masters, gradients, communication and inputs; and the loss scale of fp16."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shardline.config import Config
from shardline.errors import ShardlineError
from shardline.names import listed
from shardline.plan.placement import Placement
from shardline.sharding.containers import replace_tensors, tensors_in

__all__ = ["DTYPES", "LossScaler", "Precision"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SHORT_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Precision:
    """The dtypes of one engine, decided once.

    Attributes:
        compute: dtype of parameters in forward and backward.
        reduce: dtype in which gradients travel, or ``None`` for their own.
        accumulate: dtype in which gradients are added up.
        accumulates: whether a step has several micro-steps, so that what rests partial between them is a sum.
        autocast: dtype of ``torch.autocast`` around forward, or ``None``.
        cast_inputs: whether floating tensors given to ``engine(...)`` are cast to ``compute``.
        buffers: dtype to which floating buffers are cast, or ``None`` to leave them.
        modules: dtype over ``compute`` by the name of a module or parameter, or by module class; see
            :mod:`shardline.plan.describe`.
    """

    compute: torch.dtype = torch.float32
    reduce: torch.dtype | None = None
    accumulate: torch.dtype = torch.float32
    accumulates: bool = False
    autocast: torch.dtype | None = None
    cast_inputs: bool = True
    buffers: torch.dtype | None = None
    modules: dict[str, torch.dtype] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Config) -> Precision:
        compute = torch.bfloat16 if config.bf16.enabled else torch.float16 if config.fp16.enabled else torch.float32

        def optional(name: str | None) -> torch.dtype | None:
            return None if name is None else DTYPES[name]

        types = config.data_types
        autocast = config.torch_autocast
        return cls(
            compute=compute,
            reduce=optional(config.communication_data_type),
            accumulate=optional(types.grad_accum_dtype) or torch.float32,
            accumulates=config.gradient_accumulation_steps > 1,
            autocast=DTYPES[autocast.dtype] if autocast.enabled else None,
            cast_inputs=compute is not torch.float32 and (config.fp16.auto_cast or config.bf16.enabled),
            buffers=optional(types.buffer_dtype),
            modules={name: DTYPES[dtype] for name, dtype in types.module_dtypes.items()},
        )

    def param_dtype(self, module: nn.Module, param: Tensor, chosen: torch.dtype | None = None) -> torch.dtype:
        """The dtype in which ``param``, held by ``module``, takes part in forward and backward.

        Args:
            chosen: what ``modules`` say of it.
        """
        if not param.is_floating_point():
            return param.dtype
        if chosen is not None:
            return chosen
        if self.compute is torch.float32:
            return torch.promote_types(param.dtype, torch.float32)  # fp64 stays what it is
        if isinstance(module, nn.modules.batchnorm._NormBase):
            # Low-precision weights next to fp32 statistics raise on CPU, and lose on every device.
            return torch.float32
        return self.compute

    def master_dtype(self, weights: torch.dtype) -> torch.dtype:
        """What the optimizer updates: at least fp32."""
        return torch.promote_types(weights, torch.float32) if weights.is_floating_point else weights

    def grad_dtype(self, weights: torch.dtype) -> torch.dtype:
        """What gradients are added up in: at least the dtype of the weights."""
        return torch.promote_types(weights, self.accumulate)

    def reduce_dtype(self, weights: torch.dtype, between: Placement) -> torch.dtype:
        """What gradients travel in that rest in placement ``between`` between micro-steps.

        Sums of several micro-steps travel as they were added up, all others as autograd makes them. The configuration
        decides, not what a rank holds: all ranks must decide alike.
        """
        sums = self.accumulates and between is Placement.PARTIAL
        return self.reduce or (self.grad_dtype(weights) if sums else weights)

    def cast(self, value: Any) -> Any:
        """``value`` with the floating tensors in it (:mod:`shardline.sharding.containers`) in the compute dtype.

        What is cast lies in copies of the containers, of their types; complex tensors keep their dtype.

        Raises:
            UsageError: for a container of which no copy can be made.
        """
        return replace_tensors(value, self._cast)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.compute) if tensor.is_floating_point() else tensor

    def not_cast(self, value: Any) -> torch.dtype | None:
        """The dtype of a floating tensor in ``value`` that :meth:`cast` would change, if there is one."""
        others = (tensor.dtype for tensor in tensors_in(value) if tensor.is_floating_point())
        return next((dtype for dtype in others if dtype is not self.compute), None)

    def explain(self, error: BaseException, model: nn.Module) -> bool:
        """Where torch complains of dtypes in a low-precision forward, name the floating buffers of other dtypes.

        Returns whether the error is such a complaint.
        """
        if not self.cast_inputs or isinstance(error, ShardlineError) or not _ABOUT_DTYPES.search(str(error)):
            return False
        others = {
            f"{path}.{name}".lstrip("."): buffer.dtype
            for path, module in model.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_floating_point() and buffer.dtype is not self.compute
            # These are made to keep fp32 statistics with inputs of lower precision.
            if not isinstance(module, nn.modules.batchnorm._NormBase)
        }
        if others:
            named = listed([f"{name} ({dtype})" for name, dtype in others.items()], _NAMED)
            error.add_note(
                f"Weights and inputs are {self.compute} here, and these buffers are not: {named}. Floating buffers "
                f"keep their dtype. Cast them where they are used, or have all of them cast: "
                f'"data_types": {{"buffer_dtype": "{_SHORT_NAMES[self.compute]}"}}.'
            )
        return True


_ABOUT_DTYPES = re.compile(r"dtype|scalar type|Input type")
"""Part of torch's message where two tensors have different dtypes."""

_NAMED = 5
"""Buffers that a message names."""


@dataclass
class LossScaler:
    """The factor on the loss that keeps fp16 gradients from vanishing.

    Dynamic scaling halves it after ``hysteresis`` overflows (not below ``minimum``) and doubles it after every
    ``window`` good steps; the counting is DeepSpeed's. A static scale never changes. (Micikevicius et al. 2018,
    "Mixed precision training", section 3.2.)
    """

    scale: float = 1.0
    dynamic: bool = False
    window: int = 1000
    hysteresis: int = 2
    consecutive: bool = False
    minimum: float = 1.0
    patience: int = field(default=0, init=False)
    good_steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.patience = self.hysteresis

    @classmethod
    def from_config(cls, config: Config) -> LossScaler:
        fp16 = config.fp16
        if not fp16.enabled:
            return cls()
        if fp16.loss_scale > 0:
            return cls(scale=float(fp16.loss_scale))
        return cls(
            scale=2.0**fp16.initial_scale_power,
            dynamic=True,
            window=fp16.loss_scale_window,
            hysteresis=fp16.hysteresis,
            consecutive=fp16.consecutive_hysteresis,
            minimum=float(fp16.min_loss_scale),
        )

    def update(self, *, overflow: bool) -> None:
        """Adapt the scale after a step."""
        if not self.dynamic:
            return
        if overflow:
            self.good_steps = 0
            if self.patience > 1:
                self.patience -= 1
            else:
                self.scale = max(self.scale / 2, self.minimum)
            return
        self.good_steps += 1
        if self.consecutive:
            self.patience = self.hysteresis
        if self.good_steps % self.window == 0:
            self.patience = self.hysteresis
            self.scale *= 2

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "patience": self.patience, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.patience, self.good_steps = state["scale"], state["patience"], state["good_steps"]
