"""What ``deepspeed.initialize`` returns as the optimizer: the engine's, with DeepSpeed's attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from shardline.errors import OptimizerError

if TYPE_CHECKING:
    from shardline.compat.deepspeed.engine import DeepSpeedEngine

__all__ = ["DeepSpeedOptimizer", "EngineOptimizer", "ParameterOffload"]


_PART = "part_of_rank"


class DeepSpeedOptimizer:
    """The base of DeepSpeed's optimizers, for ``isinstance``."""


class ParameterOffload:
    """What TRL takes DeepSpeed's hooks off from while it generates, and puts them back. There are none here."""

    def __init__(self) -> None:
        self.module = _NoParameters()
        self.forward_hooks: list[Any] = []
        self.backward_hooks: list[Any] = []

    def _register_deepspeed_module(self, module: nn.Module) -> None:
        pass


class _NoParameters(nn.Module):
    def ds_external_parameters(self) -> tuple[()]:
        return ()


class EngineOptimizer(DeepSpeedOptimizer, Optimizer):
    """The optimizer of an engine, whose ``step`` is the engine's. All it does not have is the wrapped optimizer's.

    Attributes:
        optimizer: the torch optimizer whose param groups and state these are.
    """

    _engine: DeepSpeedEngine
    optimizer: Optimizer

    def __init__(self, engine: DeepSpeedEngine, optimizer: Optimizer) -> None:
        # Not Optimizer.__init__: groups, state and hooks are the wrapped one's.
        self.__dict__.update(_engine=engine, optimizer=optimizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optimizer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("param_groups", "state", "defaults"):
            setattr(self.optimizer, name, value)
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return self.optimizer.__getstate__()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """``engine.step()``."""
        self._engine.step()

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """``engine.backward(loss)``."""
        self._engine.backward(loss, retain_graph=retain_graph)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._engine.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """In torch's own form where this rank has all of it, else this rank's part, as DeepSpeed's is.

        A part cannot be loaded; a checkpoint of the engine, or ``engine.full_optimizer_state_dict()``, can.
        """
        try:
            return self.optimizer.state_dict()
        except OptimizerError:
            return {**Optimizer.state_dict(self.optimizer), _PART: self._engine.global_rank}

    def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Load a state in torch's own form, with whole tensors. Collective.

        Raises:
            OptimizerError: for a part.
        """
        if _PART in state_dict:
            raise OptimizerError(
                f"optimizer.load_state_dict was given the part of rank {state_dict[_PART]}. Load a checkpoint of the "
                f"engine, or what engine.full_optimizer_state_dict() gives."
            )
        self.optimizer.load_state_dict(state_dict)

    @property
    def overflow(self) -> bool:
        """Whether the last step was skipped because its gradients were not finite."""
        return self._engine.last_step_skipped()

    @property
    def loss_scale(self) -> float:
        """The current loss scale; 1.0 without fp16."""
        return self._engine.scaler.scale

    cur_scale = loss_scale

    @property
    def dynamic_loss_scale(self) -> bool:
        return self._engine.dynamic_loss_scale()

    @property
    def scale_window(self) -> int:
        """Good steps after which the loss scale doubles."""
        return self._engine.scaler.window

    @property
    def cur_iter(self) -> int:
        """Steps, skipped ones included."""
        return self._engine.progress.global_steps

    @property
    def _global_grad_norm(self) -> float | Tensor | None:
        return self._engine.get_global_grad_norm()

    def refresh_fp32_params(self) -> None:
        """Nothing to do: masters follow the weights."""
