"""The only file that knows module hooks and autograd: it turns what the model does into calls of the schedule.

Around a module that uses a unit: gather before, release after. In backward, three things are watched:

* tensors that autograd saved and that lie in a gathered buffer are kept as a place in it, and looked up again, after a
  gather, when backward wants them (``saved_tensors_hooks``);
* the gradient of a unit's inputs, whose completion hints that the unit's own gradients are complete;
* the gradient of the model's outputs, which says that a backward began that ``engine.backward`` did not start.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from shardline.plan.describe import is_below
from shardline.runtime.modes import is_recorded, outside_modes
from shardline.sharding.bucket import Bucket
from shardline.sharding.containers import tensors_in
from shardline.sharding.schedule import Schedule
from shardline.sharding.unit import Unit

__all__ = ["Compiled", "Hooks", "watch_outputs"]


@dataclass(frozen=True)
class _Place:
    """A saved tensor as a place in a bucket: autograd holds this instead of the memory."""

    unit: Unit
    bucket: Bucket
    generation: int
    param: nn.Parameter
    version: int
    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Foreign:
    """A tensor that hooks outside of ours packed, and how they unpack it."""

    unpack: Callable[[Any], Tensor]
    packed: Any


class _Graph(Enum):
    """How long a graph that autograd builds can be needed."""

    INNER = "inner"  # until the transforms of torch.func that run around it are left, or not at all
    OUTER = "outer"  # for a backward of the user's


_hooks_are_enabled: Callable[[], bool] = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]


def _graph_here() -> _Graph:
    return _Graph.OUTER if is_recorded() else _Graph.INNER


class _Hook:
    """A module hook that stays behind when the module is copied or pickled: the copy is no engine's."""

    def __init__(self, call: Callable[..., None], *first: Any) -> None:
        self._call, self._first = call, first

    def __call__(self, *args: Any) -> None:
        self._call(*self._first, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _NOTHING

    def __reduce__(self) -> tuple[Any, ...]:
        return _NOTHING.__reduce__()  # type: ignore[return-value]


_NOTHING: Callable[..., None] = nullcontext().__exit__
"""What is left of a hook in a copy: nothing, of the standard library, so that a pickled module needs no Shardline."""


@dataclass(frozen=True)
class Compiled:
    """Paths of the modules that are compiled.

    Attributes:
        inside: what runs inside these is compiled, their hooks are not.
        around: the hooks of these are compiled as well.
    """

    inside: frozenset[str] = frozenset()
    around: frozenset[str] = frozenset()


_NOT_COMPILED = Compiled()


class Hooks:
    """The hooks of one engine on one model. ``remove`` takes them off again.

    ``on_forward`` is called when a forward of the model begins, and returns the hooks that serve it: others than these
    where the model was planned again at that moment. ``on_call`` is called before each module that no other one of the
    model's calls, outside of any backward: whether it is the model itself, and what it is given.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        schedule: Schedule,
        on_forward: Callable[[], Hooks],
        on_call: Callable[[bool, Any], None] | None = None,
        compiled: Compiled = _NOT_COMPILED,
    ) -> None:
        self.schedule, self._on_forward, self._on_call = schedule, on_forward, on_call
        self._stack: list[tuple[list[Unit], bool]] = []
        self._saves = any(unit.sharded for unit in units)
        self._pool = units[0].pool if units else None
        self._outer: list[tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None] = []
        self._pinned: list[tuple[Unit, _Graph]] = []
        self._handles: list[Any] = []
        self._model, modules = model, dict(model.named_modules())
        used: dict[str, list[Unit]] = {"": []}
        for unit in units:
            for path in unit.plan.users:
                # A root's hooks serve all that is inside it; those inside are for calls that go past the root.
                inside = {root for root in unit.plan.roots if path != root and is_below(path, root)}
                if path in unit.plan.roots or not inside or (unit.sharded and not inside & compiled.inside):
                    used.setdefault(path, []).append(unit)
        self._root = used[""]
        enter, leave = self._before, self._after
        if any(
            path in compiled.around or any(path != root and is_below(path, root) for root in compiled.inside)
            for path in used
        ):
            # The user compiled what runs the hooks as well; they must not be traced.
            enter, leave = torch.compiler.disable(enter), torch.compiler.disable(leave)
        for path, its_units in used.items():
            module, is_model = modules[path], not path
            before = module.register_forward_pre_hook(_Hook(enter, its_units, is_model), prepend=True, with_kwargs=True)
            after = module.register_forward_hook(_Hook(leave, is_model), always_call=True)
            self._handles += [before, after]

    @outside_modes
    def unwind(self) -> None:
        """Leave all modules that an interrupt (which skips their hooks) left half-way."""
        while self._stack:
            self._leave(*self._stack.pop())
        self.schedule.end_forward()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.unpin()

    # -- around a module --------------------------------------------------------------------------------------------

    def _before(
        self, units: list[Unit], is_model: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._on_call is not None and not self._stack and not self.schedule.in_backward:
            self._on_call(is_model, (args, kwargs))
        self._enter(units, is_model, args, kwargs, self._unwatched())

    @outside_modes
    def _enter(
        self, units: list[Unit], is_model: bool, args: tuple[Any, ...], kwargs: dict[str, Any], unwatched: _Graph | None
    ) -> None:
        schedule = self.schedule
        if schedule.in_backward and torch._C._current_graph_task_id() == -1:
            schedule.abort_backward()  # an error ended it, and nobody told
        with_grad = torch.is_grad_enabled()
        if is_model and not schedule.in_backward and not self._stack:
            current = self._on_forward()
            if current is not self:  # the hook that will end this forward is one of theirs
                return current._enter(current._root, is_model, args, kwargs, unwatched)
            if self._pinned and _hooks_are_enabled():
                self._unpin(_Graph.INNER)
            schedule.begin_forward(with_grad=with_grad)
        watched = with_grad and not schedule.in_backward and unwatched is None
        pushed = self._saves and not self._stack and watched and self._push()
        fresh = [unit for unit in units if not unit.holds]
        held: list[Unit] = []
        self._stack.append((held, pushed))  # before anything can fail: what is done here is undone in any case
        for unit in units:
            if schedule.use(unit):
                held.append(unit)
            if unwatched is not None:
                self._pin(unit, unwatched)
        if with_grad:
            for unit in fresh:
                # A recomputation joins the graph only where its first run, without gradients, did not.
                if not schedule.in_backward or not schedule.called(unit):
                    self._expect(unit, (args, kwargs) if unwatched is None else ())

    @outside_modes
    def _after(self, is_model: bool, module: nn.Module, args: Any, output: Any) -> None:
        if not self._stack:  # the hook before it did not get as far
            return
        self._leave(*self._stack.pop())
        if is_model and not self._stack:  # a model may call itself
            self.schedule.end_forward()

    def _leave(self, held: list[Unit], pushed: bool) -> None:
        for unit in held:
            self.schedule.done(unit)
        if pushed:
            self._pop()

    def _expect(self, unit: Unit, given: Any) -> None:
        inputs = [tensor for tensor in tensors_in(given) if tensor.requires_grad]
        for tensor in inputs:
            handle = tensor.register_hook(partial(self._input_ready, unit, tensor.is_leaf))
            if tensor.is_leaf:  # it outlives the graph, and would gather hooks
                self.schedule.call_at_end(handle.remove)
        self.schedule.expect(unit, len(inputs))

    @outside_modes
    def _input_ready(self, unit: Unit, leaf: bool, grad: Tensor) -> None:
        self.schedule.input_ready(unit, at_once=not leaf)

    # -- weights outside of their modules ---------------------------------------------------------------------------

    @contextmanager
    def around(self, units: Sequence[Unit]) -> Iterator[None]:
        """Within it, a graph may be built of ``units``, which are whole: what it saves of them is kept as places."""
        unwatched = self._unwatched()
        if unwatched is not None:
            for unit in units:
                self._pin(unit, unwatched)
        pushed = self._saves and unwatched is None and torch.is_grad_enabled() and self._push()
        try:
            yield
        except BaseException as error:
            self.explain(error)
            raise
        finally:
            if pushed:
                self._pop()

    def explain(self, error: BaseException) -> None:
        """Say on torch's refusal of saved-tensor hooks under ``torch.func`` whose these hooks are."""
        if self._saves and isinstance(error, RuntimeError) and "saved tensor hooks" in str(error):
            error.add_note(
                "At stage 3 the engine has such hooks inside a forward of the model and inside gathered_parameters(). "
                "Take the transform of engine(...) itself, or torch.autograd.grad(..., create_graph=True) in the "
                "model; around gathered_parameters(), torch.no_grad() keeps the hooks away."
            )

    def touch(self, unit: Unit) -> bool:
        """A sealed parameter of ``unit`` is used. Gathers it where all ranks can be doing the same; whether it did."""
        return self._touch(unit, self._unwatched(), _graph_here())

    @outside_modes
    def _touch(self, unit: Unit, unwatched: _Graph | None, graph: _Graph) -> bool:
        if self.schedule.touch(unit):
            if unwatched is not None:
                self._pin(unit, unwatched)
            return True
        if not self._in_method():
            return False
        # Nothing tells when the method ends, so no hooks can be pushed for it.
        self.schedule.use(unit)
        self._pin(unit, graph)
        self.schedule.done(unit)
        return True

    def _in_method(self) -> bool:
        """Whether a method of one of the model's modules runs that is no administration, as those of ``nn.Module``."""
        modules = {id(module) for module in self._model.modules()}
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_name
            own = name == "forward" or not hasattr(nn.Module, name)
            if own and frame.f_code.co_varnames[:1] == ("self",) and id(frame.f_locals.get("self")) in modules:
                return True
            frame = frame.f_back
        return False

    # -- graphs that autograd does not tell of ----------------------------------------------------------------------

    def _unwatched(self) -> _Graph | None:
        """The graph that is built here without saved-tensor hooks: those that ``torch.func`` builds know none."""
        if not self._saves or _hooks_are_enabled() or not torch.is_grad_enabled():
            return None
        return None if self.schedule.in_backward else _graph_here()

    def _pin(self, unit: Unit, graph: _Graph) -> None:
        """Keep ``unit`` whole for ``graph``, which holds its parameters themselves."""
        if unit.sharded:
            unit.pinned = True
            self._pinned.append((unit, graph))

    @outside_modes
    def unpin(self) -> None:
        """No graph from here on needs a unit that stayed for it."""
        self._unpin(_Graph.OUTER)

    def _unpin(self, graph: _Graph) -> None:
        pinned, self._pinned = self._pinned, []
        for unit, _ in pinned:
            unit.pinned = False
        for unit, kind in pinned:
            if kind is not graph and graph is _Graph.INNER:
                self._pin(unit, kind)
        for unit, _ in pinned:
            unit.reshard()

    # -- what autograd saves ----------------------------------------------------------------------------------------

    def _push(self) -> bool:
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if top is not None and "checkpoint" in getattr(top[0], "__module__", ""):
            return False  # it keeps nothing that lies in our buffers, and counts what it sees
        if top is not None and top[0] == self._pack:
            return False
        self._outer.append(top)
        torch._C._autograd._push_saved_tensors_default_hooks(self._pack, self._unpack)
        return True

    def _pop(self) -> None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        self._outer.pop()

    def _pack(self, tensor: Tensor) -> Any:
        place = self._find(tensor)
        if place is not None:
            return place
        outer = self._outer[-1]
        return tensor if outer is None else _Foreign(outer[1], outer[0](tensor))

    def _unpack(self, saved: Any) -> Tensor:
        if isinstance(saved, _Foreign):
            return saved.unpack(saved.packed)
        return self._look_up(saved) if isinstance(saved, _Place) else saved

    @outside_modes
    def _look_up(self, saved: _Place) -> Tensor:
        unit, bucket = saved.unit, saved.bucket
        if saved.generation != bucket.weights.generation or saved.version != saved.param._version:
            raise RuntimeError(
                f"one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"parameter {saved.name!r} was changed (by step(), or in place) between this forward and its backward."
            )
        self.schedule.need(unit)
        if bucket.weights.full is None:
            raise AssertionError(f"unit {unit.name} was needed and is not here")
        return bucket.weights.full.as_strided(
            saved.size, saved.stride, bucket.weights.full.storage_offset() + saved.offset
        )

    @outside_modes
    def _find(self, tensor: Tensor) -> _Place | None:
        if self._pool is None or not torch._C._has_storage(tensor) or not tensor.numel():
            return None
        holds: tuple[Unit, Bucket] | None = self._pool.label_of(tensor)
        if holds is None:
            return None
        unit, bucket = holds
        if bucket.weights.full is None or tensor.dtype != bucket.plan.dtype:
            return None
        offset = int(tensor.storage_offset()) - int(bucket.weights.full.storage_offset())
        index = bisect_right(bucket.plan.entries, offset, key=lambda entry: entry.offset) - 1
        param, entry = bucket.params[index], bucket.plan.entries[index]
        return _Place(
            unit, bucket, bucket.weights.generation, param, param._version, entry.param.name,
            tensor.size(), tensor.stride(), offset,
        )  # fmt: skip


def watch_outputs(
    output: Any, begin: Callable[[], bool], end: Callable[[], None], params: Sequence[nn.Parameter]
) -> None:
    """Notice a backward through ``output`` that the engine did not start.

    ``begin`` is called as such a backward enters and says whether it is news; ``end`` when all of it, reentrant inner
    backwards included, is over. ``params`` are the trainable parameters: where the backward fills no ``.grad`` of
    theirs (``torch.autograd.grad``), nothing happens.
    """

    def entered(grad: Tensor) -> None:
        if any(_accumulates(param) for param in params) and begin():
            Variable._execution_engine.queue_callback(end)

    for tensor in dict.fromkeys(tensors_in(output)):
        if tensor.requires_grad and tensor.grad_fn is not None:
            tensor.register_hook(entered)


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
