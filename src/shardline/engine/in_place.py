"""``shard``: the loop, the model and the optimizer stay the user's own, and an engine works behind them.

The engine is that of :func:`shardline.initialize`, made with an *inner* optimizer: the user's class and options, over
this rank's runs. The user's optimizer keeps the model's own parameters; its ``step()`` hands its options to the inner
one and is the engine's. A backward is noticed at the outputs of the model, whichever of its modules the loop calls.
"""

from __future__ import annotations

import os
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardline.config import Config
from shardline.engine.engine import Engine
from shardline.engine.initialize import initialize
from shardline.engine.loss_checks import LossChecks, is_some_loss_scaled
from shardline.engine.optimizer_state import states_by_name
from shardline.errors import ConfigError, OptimizerError, UsageError
from shardline.events import Notice
from shardline.optim.closure import evaluate
from shardline.plan.describe import first_names
from shardline.runtime.modes import outside_modes, untraced
from shardline.sharding.hooks import ModuleHook
from shardline.sharding.precision import LossScaler
from shardline.sharding.window import State, Window

__all__ = ["InPlaceEngine", "shard"]


def shard(
    model: nn.Module,
    optimizer: Optimizer,
    config: str | os.PathLike[str] | Mapping[str, Any] | Config | None = None,
    *,
    mesh: Any = None,
) -> InPlaceEngine:
    """Shard ``model`` and ``optimizer`` in place, for a loop that goes on as it is. Collective.

    The loop calls the model, ``loss.backward()``, ``optimizer.step()`` and ``optimizer.zero_grad()`` as before; a
    scheduler may have been attached to the optimizer or be attached later, and is stepped by the loop. What lies
    between two steps is one window: its gradient is the **sum** of what its backwards gave, averaged over the ranks.

    Args:
        model: an ``nn.Module`` on any device; rank 0's weights and buffers win on every rank.
        optimizer: a ``torch.optim.Optimizer`` over parameters of ``model``. It may have stepped before: its state is
            kept.
        config: a dict, a path of a JSON file, or a :class:`shardline.Config`; the stage, the precision, a clipping
            norm. Batch sizes serve for counting only. ``gradient_accumulation_steps`` says how many batches a window
            mostly has, so that stages 0 and 1 reduce only at the last; nothing is divided by it.
        mesh: a one-dimensional ``DeviceMesh`` whose group the engine uses instead of all ranks.

    Returns:
        The engine, for what has no place in a plain loop: checkpoints, whole weights, ``no_sync()``, ``destroy()``.

    Raises:
        UsageError: if ``optimizer`` is none.
        ConfigError: for a scheduler or ``torch_autocast`` in the configuration: both are the loop's here.
        ModelError, OptimizerError, DisagreementError: as :func:`shardline.initialize`.
    """
    if not isinstance(optimizer, Optimizer):
        raise UsageError(f"shard was given optimizer={type(optimizer).__name__}; it needs a torch.optim.Optimizer.")
    inner = _inner(optimizer)
    names: dict[Tensor, str] = {param: aliases[0] for param, aliases in first_names(model).items()}
    # Adagrad makes its state when it is built and would make the same again.
    held = {names[p]: dict(s) for p, s in optimizer.state.items() if s and s.get("step") != 0 and p in names}
    engine, *_ = initialize(model=model, optimizer=inner, config=config, mesh=mesh, engine_class=InPlaceEngine)
    if not isinstance(engine, InPlaceEngine):
        raise AssertionError("initialize made an engine of another class")
    engine.bind(optimizer, held)
    return engine


def _inner(optimizer: Optimizer) -> Optimizer:
    """Another optimizer of the same class and options over the same parameters, without state and hooks."""
    inner: Optimizer = object.__new__(type(optimizer))
    own = ("step", "zero_grad", "add_param_group", "state_dict", "load_state_dict")  # wrapped by a scheduler, say
    inner.__dict__.update({key: value for key, value in vars(optimizer).items() if key not in own})
    for key, value in vars(optimizer).items():
        if key.startswith("_optimizer_") and isinstance(value, OrderedDict):
            inner.__dict__[key] = OrderedDict()
    inner.param_groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    inner.state = defaultdict(dict)
    return inner


class LoopWindow(Window):
    """A window that lies between two steps of a plain loop: nothing divides its backwards, and their number is open.

    Args:
        batches: how many it mostly has.
    """

    def __init__(self, batches: int) -> None:
        self._expected = batches
        super().__init__(1)

    @property
    def at_boundary(self) -> bool:
        """Whether the backward that comes next is taken for the last."""
        if self.forced_boundary is not None:
            return self.forced_boundary
        return self._batches + (self.state is State.FORWARD) >= self._expected

    def end_as_sum(self) -> int:
        if not self._weighted:
            self.weight = 1.0
        uncounted = max(self._batches - self.steps, 0)
        self.steps += uncounted
        self.counted += uncounted
        self.end()
        return uncounted


class _LoopLossChecks(LossChecks):
    """In place a plain backward is expected, and a GradScaler belongs to the loop."""

    def see_plain_backward(self, loss_scale: float) -> None:
        pass


class InPlaceEngine(Engine):
    """An engine behind a plain loop. Made by :func:`shard`."""

    _window: LoopWindow
    _window_kind = LoopWindow
    _loss_checks_kind = _LoopLossChecks

    def __init__(self, model: nn.Module, layout: Any, optimizer: Any, groups: Any, config: Config, *args: Any) -> None:
        if config.scheduler is not None:
            raise ConfigError(
                "the configuration has a scheduler, and shard() leaves the schedule to the loop. Attach one to the "
                "optimizer and delete the section, or use shardline.initialize."
            )
        if config.torch_autocast.enabled:
            raise ConfigError(
                "torch_autocast is enabled, and shard() leaves autocast to the loop. Put torch.autocast around forward "
                "and loss and delete the section, or use shardline.initialize."
            )
        self._loop: _LoopOptimizer | None = None
        self._has_stepped = False
        super().__init__(model, layout, optimizer, groups, config, *args)
        self.trainables.serve_loop(self._watch, self._grads.stand_in)
        if self.precision.cast_inputs:
            casting = model.register_forward_pre_hook(ModuleHook(self._cast), prepend=True, with_kwargs=True)
            self.on_destroy(casting.remove)

    def bind(self, optimizer: Optimizer, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Make ``optimizer`` this engine's; ``state``, by name of the parameter, is what it held before."""
        if self.optimizer is None:
            raise AssertionError("an engine in place has an optimizer")
        self._loop = _LoopOptimizer(optimizer, self.optimizer, self)
        if state and not self.progress.global_steps:
            self._load_optimizer_states(states_by_name(state, self._optimizer_state().specs))
        self._loop.pull()
        self.on_destroy(self._loop.release)

    def _cast(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return self._calls.cast(args, kwargs)

    def _make_scaler(self, config: Config) -> LossScaler:
        return LossScaler()  # the loop's GradScaler scales

    # -- gradients between backward and step --------------------------------------------------------------------------

    @outside_modes
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradients of this window to the global L2 norm ``max_norm``, before the step. Collective.

        Returns:
            The norm of the averaged gradients before clipping: a 0-dim fp32 tensor, the same on every rank.
        """
        self.trainables.check_trains("clip_grad_norm_()")
        norm = self._grads.norm()
        self._grads.scale((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm.float().to(self.device)

    # -- the step -----------------------------------------------------------------------------------------------------

    def step(self, weight: float | None = None, *, boundary: bool | None = None, lr_kwargs: Any = None) -> None:
        """What ``optimizer.step()`` is. With ``boundary=False`` the window goes on: see :meth:`Engine.step`."""
        loop = self._bound()
        if not self._has_stepped and self.precision.compute is torch.float16 and not is_some_loss_scaled():
            self.events.emit(
                Notice(
                    "gradients of fp16 came without a loss scale: what is below 6e-8 on its way is lost. Use a "
                    "torch.amp.GradScaler in the loop"
                )
            )
        self._has_stepped = True
        loop.push()
        super().step(weight, boundary=boundary is None or boundary, lr_kwargs=lr_kwargs)
        loop.pull()

    def full_optimizer_state_dict(self, rank0_only: bool = False) -> dict[str, Any]:
        """As :meth:`Engine.full_optimizer_state_dict`; rates and options are those of the loop's optimizer now."""
        self._bound().push()
        return super().full_optimizer_state_dict(rank0_only)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> bool:
        """As :meth:`Engine.save_checkpoint`; rates and options are those of the loop's optimizer now."""
        self._bound().push()
        return super().save_checkpoint(*args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> tuple[str | None, dict[str, Any] | None]:
        """As :meth:`Engine.load_checkpoint`."""
        found = super().load_checkpoint(*args, **kwargs)
        self._bound().pull()
        return found

    def _bound(self) -> _LoopOptimizer:
        self.trainables.check_trains("step()")
        if self._loop is None:
            raise AssertionError("an engine in place has the optimizer of its loop")
        return self._loop


class _LoopOptimizer:
    """The user's optimizer, whose methods are the engine's.

    Options of param groups are in the dicts of both optimizers. Before a step what the loop has changed goes to the
    inner one, and after it what the inner one has changed comes back.
    """

    def __init__(self, outer: Optimizer, inner: Optimizer, engine: InPlaceEngine) -> None:
        self.outer, self.inner = outer, inner
        self._seen: list[dict[str, Any]] = []
        self._state = outer.state
        self._before = {name: vars(outer)[name] for name in self._methods(outer, engine) if name in vars(outer)}
        for name, method in self._methods(outer, engine).items():
            setattr(outer, name, MethodType(untraced(method), outer))
        outer.state = _StateOfEngine(dict)
        # Else a GradScaler leaves unscaling to the step, and gives the optimizer what only fused kernels read.
        self._before["_step_supports_amp_scaling"] = getattr(outer, "_step_supports_amp_scaling", False)
        outer._step_supports_amp_scaling = False  # type: ignore[attr-defined]

    def _methods(self, outer: Optimizer, engine: InPlaceEngine) -> dict[str, Callable[..., Any]]:
        add, original = outer.add_param_group, outer.step

        @wraps(getattr(original, "__func__", original))
        def step(optimizer: Any, closure: Callable[[], Any] | None = None) -> Any:
            optimizer._opt_called = True  # what a scheduler that was attached before asks for
            loss = evaluate(closure)
            for hook in list(optimizer._optimizer_step_pre_hooks.values()):
                hook(optimizer, (), {})
            engine.step()
            for hook in list(optimizer._optimizer_step_post_hooks.values()):
                hook(optimizer, (), {})
            return loss

        def zero_grad(optimizer: Optimizer, set_to_none: bool = True) -> None:
            engine.zero_grad()

        def add_param_group(optimizer: Optimizer, group: dict[str, Any]) -> None:
            params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
            self.inner.add_param_group({**group, "params": list(params)})
            add({**group, "params": params})
            self.pull()

        def state_dict(optimizer: Optimizer) -> dict[str, Any]:
            self.push()
            return self.inner.state_dict()

        def load_state_dict(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
            self.inner.load_state_dict(dict(state_dict))
            self.pull()

        return {
            "step": step,
            "zero_grad": zero_grad,
            "add_param_group": add_param_group,
            "state_dict": state_dict,
            "load_state_dict": load_state_dict,
        }

    def push(self) -> None:
        """Give the inner optimizer the options that the loop has set since."""
        for outer, inner, seen in zip(self.outer.param_groups, self.inner.param_groups, self._seen, strict=True):
            for key, value in outer.items():
                if key != "params" and seen.get(key, seen) is not value:
                    inner[key] = value

    def pull(self) -> None:
        """Take over the options that the inner optimizer, or a checkpoint, has set."""
        for outer, inner in zip(self.outer.param_groups, self.inner.param_groups, strict=True):
            for key, value in inner.items():
                if key != "params":
                    outer[key] = value
        self._seen = [dict(group) for group in self.outer.param_groups]

    def release(self) -> None:
        for name in ("step", "zero_grad", "add_param_group", "state_dict", "load_state_dict"):
            self.outer.__dict__.pop(name, None)
        self.outer.__dict__.update(self._before)
        self.outer.state = defaultdict(dict)


class _StateOfEngine(defaultdict[Any, Any]):
    """``optimizer.state`` while an engine has it: reading it of a parameter is an error, as none of it is here."""

    def __missing__(self, key: Any) -> Any:
        raise OptimizerError(
            "optimizer.state: the engine keeps the optimizer's state, sharded. Read all of it with "
            "engine.full_optimizer_state_dict(), or this rank's fragments in engine.after_step(fn)."
        )
