"""Lightning's strategies: its Trainer and its Fabric over engines of :func:`shardline.shard`.

    Trainer(strategy="shardline_stage_3")         # after: import shardline.integrations.lightning
    Trainer(strategy=ShardlineStrategy({"zero_optimization": {"stage": 3}}))
    Fabric(strategy=ShardlineFabricStrategy(config))

Processes, devices, precision and checkpoints are those of Lightning's DDP. A checkpoint holds whole weights and whole
optimizer states: DDP, any stage and any number of ranks go on from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardline.engine.in_place import InPlaceEngine
from shardline.errors import UsageError
from shardline.integrations import require
from shardline.integrations.engines import make_engine, not_last

require("lightning", "shardline.integrations.lightning")

from lightning.fabric.strategies import STRATEGY_REGISTRY as FABRIC_REGISTRY  # noqa: E402
from lightning.fabric.strategies import DDPStrategy as FabricDDPStrategy  # noqa: E402
from lightning.fabric.strategies.strategy import _BackwardSyncControl  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry  # noqa: E402

__all__ = ["ShardlineFabricStrategy", "ShardlineStrategy"]

NAMES = {f"shardline_stage_{stage}": stage for stage in range(4)}


class _Engines:
    """What both strategies do. It stands before Lightning's own class.

    Args:
        config: that of :func:`shardline.shard`: a dict, a path or a ``shardline.Config``.
        stage: instead of a configuration.
        compile: compile block by block, with these arguments of ``torch.compile``.
        **kwargs: those of Lightning's ``DDPStrategy``.

    Attributes:
        engines: one for each optimizer, in their order.
    """

    root_device: torch.device

    def __init__(
        self,
        config: Any = None,
        *,
        stage: int | None = None,
        compile: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if config is not None and stage is not None:
            raise UsageError("a strategy of Shardline was given a configuration and a stage. Give it one of them.")
        self._config = config if stage is None else {"zero_optimization": {"stage": stage}}
        self._compile = compile
        self.engines: list[InPlaceEngine] = []
        self._optimizers_of_engines: list[Optimizer] = []

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        for name, stage in NAMES.items():
            if name not in strategy_registry:
                strategy_registry.register(name, cls, description=f"Shardline at stage {stage}", stage=stage)

    def _shard(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Shard ``module`` with its one optimizer; or, for several, the parts of it that each of them has.

        Raises:
            UsageError: if a part has two optimizers.
        """
        parts = [module] if len(optimizers) == 1 else [_part(module, optimizer) for optimizer in optimizers]
        for part, optimizer in zip(parts, optimizers, strict=True):
            if any(other is not part and other in part.modules() for other in parts) or parts.count(part) > 1:
                raise UsageError(
                    "two optimizers share a module, and an engine has one. Give each optimizer the parameters of a "
                    "submodule of its own, or put them into param groups of one optimizer."
                )
            device, compile = self.root_device, self._compile
            self.engines.append(make_engine(part, optimizer, self._config, device=device, compile=compile))
            self._optimizers_of_engines.append(optimizer)

    @contextmanager
    def _gathered(self, *, write: bool) -> Iterator[None]:
        with ExitStack() as stack:
            for engine in self.engines:
                stack.enter_context(engine.gathered_parameters(write=write))
            yield

    def _module_state(self, module: nn.Module) -> dict[str, Any]:
        """The whole state of ``module`` on rank 0, on CPU; an empty dict elsewhere. Collective."""
        names = {part: name for name, part in module.named_modules()}
        states = {
            names[engine.module]: engine.full_state_dict(rank0_only=True)
            for engine in self.engines
            if engine.module in names
        }
        if "" in states:
            return states[""]
        with self._gathered(write=False):
            found = {name: value.cpu() for name, value in module.state_dict().items()}
        for prefix, state in states.items():
            found.update({f"{prefix}.{name}": value for name, value in state.items()})
        return found

    def _load_module_state(self, module: nn.Module, state: Mapping[str, Any], *, strict: bool) -> None:
        with self._gathered(write=True):
            module.load_state_dict(state, strict=strict)

    def _optimizer_state(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """The whole state of ``optimizer`` on rank 0, an empty dict elsewhere; None if no engine has it. Collective."""
        for engine, own in zip(self.engines, self._optimizers_of_engines, strict=True):
            if own is optimizer:
                return engine.full_optimizer_state_dict(rank0_only=True)
        return None

    def _destroy(self) -> None:
        self._optimizers_of_engines.clear()
        while self.engines:
            self.engines.pop().destroy()


def _part(module: nn.Module, optimizer: Optimizer) -> nn.Module:
    """The smallest module in ``module`` that holds all parameters of ``optimizer``."""
    params = {id(param) for group in optimizer.param_groups for param in group["params"]}
    holders = [part for part in module.modules() if params <= {id(param) for param in part.parameters()}]
    return holders[-1] if holders else module


class ShardlineStrategy(_Engines, DDPStrategy):
    """Lightning's Trainer over an engine. A module with several optimizers has an engine for each part.

    Args:
        config: that of :func:`shardline.shard`: a dict, a path or a ``shardline.Config``.
        stage: instead of a configuration.
        compile: compile block by block, with these arguments of ``torch.compile``.
        **kwargs: those of Lightning's ``DDPStrategy``.
    """

    strategy_name = "shardline"
    _failed = False

    def configure_ddp(self) -> None:
        """Nothing is wrapped: the module is sharded together with its optimizers."""

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)
        if self.lightning_module is not None and self.optimizers:
            self._shard(self.lightning_module, self.optimizers)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        with not_last(self.engines):
            yield

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if not self.engines or self.lightning_module is None:
            state: dict[str, Any] = super().lightning_module_state_dict()
            return state
        return self._module_state(self.lightning_module)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self.lightning_module is not None:
            self._load_module_state(self.lightning_module, checkpoint["state_dict"], strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        plain = getattr(optimizer, "optimizer", optimizer)  # of a LightningOptimizer
        state = self._optimizer_state(plain)
        return dict(super().optimizer_state(optimizer)) if state is None else state

    def on_exception(self, exception: BaseException) -> None:
        self._failed = True
        super().on_exception(exception)

    def teardown(self) -> None:
        """Take the engines off. Collective, unless an exception ended the run: then they stay as they are."""
        if self._failed:
            self._lightning_module = None  # whose weights cannot be moved
        else:
            self._destroy()
        super().teardown()


class _BackwardSync(_BackwardSyncControl):
    """Fabric's ``no_backward_sync``."""

    def __init__(self, strategy: _Engines) -> None:
        self._strategy = strategy

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return not_last(self._strategy.engines) if enabled else nullcontext()


class ShardlineFabricStrategy(_Engines, FabricDDPStrategy):
    """Lightning's Fabric over an engine for each ``fabric.setup(model, optimizer)``.

    Args:
        config: that of :func:`shardline.shard`: a dict, a path or a ``shardline.Config``.
        stage: instead of a configuration.
        compile: compile block by block, with these arguments of ``torch.compile``.
        **kwargs: those of Lightning's ``DDPStrategy``.
    """

    def __init__(self, config: Any = None, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self._backward_sync_control = _BackwardSync(self)

    def setup_module_and_optimizers(self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None) -> Any:
        self._shard(module, optimizers)
        return module, optimizers, scheduler

    def setup_module(self, module: nn.Module) -> nn.Module:
        return module

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Refused.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "set up the model and its optimizer together: model, optimizer = fabric.setup(model, optimizer)"
        )

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        return self._module_state(module)

    def load_module_state_dict(self, module: nn.Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        self._load_module_state(module, state_dict, strict=strict)

    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = self._optimizer_state(optimizer)
        return dict(super().get_optimizer_state(optimizer)) if state is None else state


ShardlineStrategy.register_strategies(StrategyRegistry)
ShardlineFabricStrategy.register_strategies(FABRIC_REGISTRY)
