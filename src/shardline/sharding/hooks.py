"""Turns what the model does into calls of the schedule: module hooks, and hooks on gradients.

Around a module that uses a unit: unshard before, reshard after. In backward, three things are watched:

* tensors that autograd saved and that lie in a gathered buffer (:mod:`shardline.sharding.saved_tensors`);
* the gradient of a unit's inputs, whose completion hints that the unit's own gradients are complete;
* the gradient of the model's outputs: through it the engine sees a backward that ``engine.backward`` did not start.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from shardline.plan.describe import is_below
from shardline.runtime.modes import is_recorded, leave_modes, outside_modes, untraced
from shardline.sharding.containers import tensors_in
from shardline.sharding.saved_tensors import SavedTensors
from shardline.sharding.schedule import Schedule
from shardline.sharding.unit import Unit

__all__ = ["Hooks", "ModuleHook", "watch_outputs"]


class _GraphLifetime(Enum):
    """How long the graph that autograd builds may be used."""

    INNER = "inner"  # only inside the torch.func transforms that run around it, or not at all
    OUTER = "outer"  # until a backward of the user's


_hooks_are_enabled: Callable[[], bool] = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]


def _lifetime_here() -> _GraphLifetime:
    return _GraphLifetime.OUTER if is_recorded() else _GraphLifetime.INNER


class ModuleHook(partial[Any]):
    """A module hook that is left out when the module is copied or pickled: no engine manages the copy."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _NOTHING

    def __reduce__(self) -> tuple[Any, ...]:
        return _NOTHING.__reduce__()  # type: ignore[return-value]


_NOTHING: Callable[..., None] = nullcontext().__exit__
"""What stands for a hook in a copy: an object of the standard library, so that unpickling needs no Shardline."""


class Hooks:
    """The module hooks of one engine on one model. ``remove`` takes them off again.

    Args:
        on_forward: called when a forward of the model begins. It returns the hooks that serve this forward: new ones
            where the model was planned again at that moment.
        on_call: ``on_call(is_model, (args, kwargs))``, called before each outermost module call outside of backward.
        compiled: paths of the modules inside of which no hook runs, because their forward is compiled.
        on_output: called with the output of an outermost module call, where a graph may have been built.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        schedule: Schedule,
        on_forward: Callable[[], Hooks],
        on_call: Callable[[bool, Any], None] | None = None,
        compiled: Collection[str] = (),
        on_output: Callable[[Any], None] | None = None,
    ) -> None:
        self.schedule, self._on_forward, self._on_call, self._on_output = schedule, on_forward, on_call, on_output
        self.saved = SavedTensors(units, schedule.pre_backward)
        # Module calls in progress: the units that each holds, and whether it has pushed saved-tensor hooks.
        self._calls: list[tuple[list[Unit], bool]] = []
        self._pinned: list[tuple[Unit, _GraphLifetime]] = []
        self._handles: list[Any] = []
        self._model, modules = model, dict(model.named_modules())
        used: dict[str, list[Unit]] = {"": []}
        for unit in units:
            for path in unit.plan.users:
                # A root's hooks serve all modules inside it; hooks inside are for calls that bypass the root.
                inside = {root for root in unit.plan.roots if path != root and is_below(path, root)}
                if path in unit.plan.roots or not inside or (unit.sharded and inside.isdisjoint(compiled)):
                    used.setdefault(path, []).append(unit)
        self._root = used[""]
        for path, its_units in used.items():
            module, is_model = modules[path], not path
            before = module.register_forward_pre_hook(
                ModuleHook(self._pre_forward, its_units, is_model), prepend=True, with_kwargs=True
            )
            after = module.register_forward_hook(ModuleHook(self._post_forward, is_model), always_call=True)
            self._handles += [before, after]

    @outside_modes
    def unwind(self) -> None:
        """Undo the pre-forward hooks of calls that an interrupt ended: torch skips their post-forward hooks."""
        while self._calls:
            self._leave(*self._calls.pop())
        self.schedule.end_forward()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.unpin()

    # -- around a module --------------------------------------------------------------------------------------------

    @untraced
    def _pre_forward(
        self, units: list[Unit], is_model: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._on_call is not None and not self._calls and not self.schedule.in_backward:
            self._on_call(is_model, (args, kwargs))
        pin_for = self._must_pin_for()
        with leave_modes():
            hooks = self._begin_forward(is_model)
            if hooks is not self:  # planned again: the post-forward hook that follows is one of the new ones
                units = hooks._root
            schedule, with_grad = hooks.schedule, torch.is_grad_enabled()
            in_backward = schedule.in_backward
            outermost = with_grad and not in_backward and not hooks._calls
            pushed = outermost and pin_for is None and hooks.saved.push()
            if outermost and hooks.saved.needed and _differentiable((args, kwargs)):
                schedule.expect_into_inputs()
            fresh = [unit for unit in units if not unit.holds]
            held: list[Unit] = []
            hooks._calls.append((held, pushed))  # before anything can fail, so that it is undone in any case
            for unit in units:
                if in_backward:  # recomputation under activation checkpointing: backward releases it
                    schedule.pre_backward(unit)
                else:
                    schedule.pre_forward(unit)
                    held.append(unit)
                if pin_for is not None:
                    hooks._pin(unit, pin_for)
            if with_grad:
                for unit in fresh:
                    # A recomputation joins the graph only where its first run, without gradients, did not.
                    if not in_backward or not schedule.expects_backward(unit):
                        hooks._expect_backward(unit, (args, kwargs) if pin_for is None else ())

    def _begin_forward(self, is_model: bool) -> Hooks:
        """If this call is the model's own forward, it begins. Returns the hooks that serve the call."""
        schedule = self.schedule
        if schedule.in_backward and torch._C._current_graph_task_id() == -1:
            schedule.abort_backward()  # that backward raised an error, which autograd does not report
        if not is_model or schedule.in_backward or self._calls:
            return self
        current = self._on_forward()
        if current._pinned and _hooks_are_enabled():
            current._unpin(_GraphLifetime.INNER)
        current.schedule.begin_forward(with_grad=torch.is_grad_enabled())
        return current

    @outside_modes
    def _post_forward(self, is_model: bool, module: nn.Module, args: Any, output: Any) -> None:
        if not self._calls:  # the pre-forward hook failed before it recorded the call
            return
        self._leave(*self._calls.pop())
        if self._calls:
            return
        if is_model:  # the outermost call of it: a model may call itself
            self.schedule.end_forward()
        if self._on_output is not None and not self.schedule.in_backward and torch.is_grad_enabled():
            self._on_output(output)

    def _leave(self, held: list[Unit], pushed: bool) -> None:
        for unit in held:
            self.schedule.post_forward(unit)
        if pushed:
            self.saved.pop()

    def _expect_backward(self, unit: Unit, given: Any) -> None:
        inputs = _differentiable(given)
        for tensor in inputs:
            handle = tensor.register_hook(partial(self._post_backward, unit, tensor.is_leaf))
            if tensor.is_leaf:  # a leaf outlives the graph, and would collect one hook for each forward
                self.schedule.call_after_backward(handle.remove)
        self.schedule.expect_backward(unit, len(inputs))

    @untraced
    def _post_backward(self, unit: Unit, is_leaf: bool, grad: Tensor) -> None:
        with leave_modes():
            self.schedule.post_backward(unit, at_once=not is_leaf)

    # -- weights outside of their modules ---------------------------------------------------------------------------

    @contextmanager
    def around(self, units: Sequence[Unit]) -> Iterator[None]:
        """Within it a graph may be built on ``units``, which are whole. What it saves of them is stored as places."""
        pin_for = self._must_pin_for()
        if pin_for is not None:
            for unit in units:
                self._pin(unit, pin_for)
        pushed = pin_for is None and torch.is_grad_enabled() and self.saved.push()
        try:
            yield
        except BaseException as error:
            self.explain(error)
            raise
        finally:
            if pushed:
                self.saved.pop()

    def explain(self, error: BaseException) -> None:
        """Add a note to torch's error about saved-tensor hooks under ``torch.func``: the hooks are the engine's."""
        if self.saved.needed and isinstance(error, RuntimeError) and "saved tensor hooks" in str(error):
            error.add_note(
                "At stage 3 the engine has such hooks inside a forward of the model and inside gathered_parameters(). "
                "Take the transform of engine(...) itself, or torch.autograd.grad(..., create_graph=True) in the "
                "model; around gathered_parameters(), torch.no_grad() keeps the hooks away."
            )

    def on_sealed_access(self, unit: Unit) -> bool:
        """A sealed parameter of ``unit`` is used. Gathers it where all ranks can be doing the same; returns whether it
        did."""
        pin_for, graph = self._must_pin_for(), _lifetime_here()
        with leave_modes():
            if self.schedule.on_sealed_access(unit):
                if pin_for is not None:
                    self._pin(unit, pin_for)
                return True
            if not self._in_method():
                return False
            # The end of the method is not visible, so saved-tensor hooks could not be popped: pin the unit instead.
            self.schedule.pre_forward(unit)
            self._pin(unit, graph)
            self.schedule.post_forward(unit)
            return True

    def _in_method(self) -> bool:
        """Whether a method of one of the model's modules runs, other than the methods of ``nn.Module`` itself."""
        modules = {id(module) for module in self._model.modules()}
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_name
            own = name == "forward" or not hasattr(nn.Module, name)
            if own and frame.f_code.co_varnames[:1] == ("self",) and id(frame.f_locals.get("self")) in modules:
                return True
            frame = frame.f_back
        return False

    # -- graphs whose saved tensors cannot be packed ----------------------------------------------------------------

    def _must_pin_for(self) -> _GraphLifetime | None:
        """The lifetime of the graph that is built here, where its saved tensors cannot be packed; else None.

        ``torch.func`` allows no saved-tensor hooks, so such a graph keeps the parameters themselves.
        """
        if not self.saved.needed or _hooks_are_enabled() or not torch.is_grad_enabled():
            return None
        return None if self.schedule.in_backward else _lifetime_here()

    def _pin(self, unit: Unit, graph: _GraphLifetime) -> None:
        """Keep ``unit`` whole for a graph of lifetime ``graph``, which holds its parameters themselves."""
        if unit.sharded:
            unit.pinned = True
            self._pinned.append((unit, graph))

    @outside_modes
    def unpin(self) -> None:
        """Release the pinned units: no graph that holds their parameters is used any more."""
        self._unpin(_GraphLifetime.OUTER)

    def _unpin(self, graph: _GraphLifetime) -> None:
        pinned, self._pinned = self._pinned, []
        for unit, _ in pinned:
            unit.pinned = False
        for unit, kind in pinned:
            if kind is not graph and graph is _GraphLifetime.INNER:
                self._pin(unit, kind)
        for unit, _ in pinned:
            unit.reshard()


def _differentiable(given: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(given) if tensor.requires_grad]


def watch_outputs(
    output: Any, begin: Callable[[], bool], end: Callable[[], None], params: Sequence[nn.Parameter]
) -> None:
    """Notice a backward through ``output`` that the engine did not start.

    ``begin`` is called as such a backward enters and returns True the first time; ``end`` when all of it, reentrant
    inner backwards included, is over. ``params`` are the trainable parameters: where the backward fills no ``.grad``
    of theirs (``torch.autograd.grad``), nothing happens.
    """

    def entered(grad: Tensor) -> None:
        if any(_accumulates(param) for param in params) and begin():
            Variable._execution_engine.queue_callback(end)

    for tensor in dict.fromkeys(tensors_in(output)):
        if tensor.requires_grad and tensor.grad_fn is not None:
            tensor.register_hook(entered)


def watch_root(root: Tensor, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Have ``begin`` called when a backward begins at ``root``, and ``end`` when all of it is over."""

    def entered(grad: Tensor) -> None:
        begin()
        Variable._execution_engine.queue_callback(end)

    root.register_hook(entered)


@outside_modes
def _accumulates(param: nn.Parameter) -> bool:
    """Whether the backward that runs now fills ``.grad``, as opposed to ``torch.autograd.grad``."""
    with torch.enable_grad(), torch._C.DisableTorchFunctionSubclass():
        alias = param.view_as(param).grad_fn
    node = None if alias is None else alias.next_functions[0][0]
    if node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # the parameter itself is an input of autograd.grad
        return False
