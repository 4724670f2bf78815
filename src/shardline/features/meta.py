"""Fills a model that was created on ``meta``, an initialiser at a time, as its ordinary construction would have.

What is repeated of the construction, in its order:

* Modules are visited children first, in which order constructors finish, and each one's ``reset_parameters`` runs.
  With the same seed the same random numbers go to the same weights.
* A module with ``_init_weights`` ends its construction with it: over all modules inside it as ``nn.Module.apply``
  visits them, or as Hugging Face's models do, where each module gets the nearest such method above it, and once.

The version of a tensor on ``meta`` counts the constructor's writes. Before anything is filled the same calls are made
on ``meta``. Where they write more often than the constructor did, the extra call was not made by the constructor
(``_init_weights`` is for users there), and its writes are dropped. Where they write less often, the constructor also
wrote in a way that cannot be repeated: an error, unless ``init_fn`` writes that tensor.

Parameters have no data meanwhile. An initialiser gets a full one, on CPU and in the model's own dtype, when it first
uses it, and what it used is stored when it returns. Parameters and buffers that are real already stay as they are; only
``init_fn`` can change them.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from shardline.errors import ModelError, UsageError
from shardline.features.streaming import StreamedWeights
from shardline.names import join, listed
from shardline.sharding.build import ParamStore
from shardline.sharding.parameter import ParamRecord, make_ordinary, seal

__all__ = ["empty_weights", "fill", "is_on_meta"]

_NAMED = 20
"""Tensors that a message names."""


@contextmanager
def empty_weights(min_numel: int = 1 << 20) -> Iterator[None]:
    """Within it, parameters of at least ``min_numel`` elements are made on ``meta``, all else for real.

    For models that know more than ``reset_parameters`` and ``_init_weights`` write, in buffers (position ids, masks,
    frequencies) or small parameters (a scale): their constructor writes those, and ``initialize`` fills the large
    parameters::

        with shardline.empty_weights():
            model = Net()
        engine, *_ = shardline.initialize(model=model, config="config.json")

    A parameter goes to ``meta`` as a module gets it, before ``reset_parameters`` fills it. Only models that this thread
    makes are concerned.

    Raises:
        UsageError: for a ``min_numel`` that is not a positive integer.
    """
    if not isinstance(min_numel, int) or isinstance(min_numel, bool) or min_numel < 1:
        raise UsageError(f"empty_weights was given min_numel={min_numel!r}; it is a number of elements, 1 or more.")
    thread, made = threading.get_ident(), WeakTensorKeyDictionary()

    def register(module: nn.Module, name: str, param: nn.Parameter) -> Any:
        lazy = isinstance(param, nn.parameter.UninitializedParameter)
        if lazy or param.is_meta or param.numel() < min_numel or threading.get_ident() != thread:
            return None
        if param not in made:  # else it is tied
            made[param] = _like(
                param, torch.empty_strided(param.shape, param.stride(), dtype=param.dtype, device="meta")
            )
        return made[param]

    handle = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()


def is_on_meta(model: nn.Module) -> bool:
    """Whether any parameter or buffer of ``model`` has no data."""
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def fill(
    model: nn.Module,
    names: dict[nn.Parameter, str],
    store: ParamStore,
    init_fn: Callable[[nn.Module], None] | None = None,
) -> None:
    """Give everything on ``meta`` its values. Those of parameters are in ``store`` afterwards, not in the model.

    Args:
        names: the first name of every parameter.
        store: where values go. Those of parameters that are not on ``meta`` are there already.
        init_fn: called with every module once all are filled, in the order of ``nn.Module.apply``.

    Raises:
        ModelError: naming every parameter and buffer that nothing has written, or that the constructor wrote in a way
            that cannot be repeated.
    """
    filling = _Filling(model, names, store)
    filling.rehearse()
    filling.construct(init_fn.names if isinstance(init_fn, StreamedWeights) else frozenset())
    if isinstance(init_fn, StreamedWeights):
        filling.stream(init_fn)
    if init_fn is not None:
        filling.let(init_fn)
    filling.finish()


@dataclass(eq=False, kw_only=True)
class _State:
    """A tensor on its way to its values.

    Attributes:
        constructed: the writes that the constructor made on ``meta``.
        repeated: those of the calls that are repeated, on ``meta`` as well.
        written: whether anything wrote values.
        final: whether it was written by what comes after all that a constructor writes.
    """

    name: str
    constructed: int
    repeated: int = 0
    written: bool = False
    final: bool = False


@dataclass(eq=False, kw_only=True)
class _Param(_State):
    """A parameter.

    Attributes:
        like: a tensor without memory of its shape, strides and dtype.
        real: whether it had values from the beginning.
        stored: whether it has values that can be fetched.
        owner: the first module that has it.
    """

    like: Tensor
    real: bool
    stored: bool
    owner: nn.Module | None = None


@dataclass(eq=False, kw_only=True)
class _Buffer(_State):
    """A buffer, ``made`` what is in its place now."""

    made: Tensor


@dataclass(eq=False)
class _Call:
    """A call of an initialiser that the construction made.

    Attributes:
        module: the module that it initialises.
        spares: whether it gets scratch parameters for those that ``module`` shares with an earlier one, which wrote
            them: it drew random numbers before the weights were tied.
        final: whether it comes after all that constructors write.
        dropped: the parameters that it did not write in the construction.
    """

    initialise: Callable[[], Any]
    module: nn.Module
    spares: bool
    final: bool = False
    dropped: set[nn.Parameter] = field(default_factory=set)


class _Filling:
    """The filling of one model."""

    def __init__(self, model: nn.Module, names: dict[nn.Parameter, str], store: ParamStore) -> None:
        self._model, self._store = model, store
        self._writes = _Writes()
        self._here: dict[nn.Parameter, tuple[int, int]] | None = None  # whole now: versions and addresses as they came
        self._places = [
            (module, name, param)
            for module in model.modules()
            for name, param in module._parameters.items()
            if param is not None
        ]
        self._params = {
            param: _Param(
                name=name,
                constructed=param._version,
                like=_without_memory(param),
                real=not param.is_meta,
                stored=not param.is_meta,
            )
            for param, name in names.items()
        }
        self._paths = {module: path for path, module in model.named_modules()}
        self._buffers: dict[tuple[nn.Module, str], _Buffer] = {}
        self._real_buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        for path, module in model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    full = join(path, name)
                    self._buffers[module, name] = _Buffer(name=full, constructed=buffer._version, made=buffer)
                elif buffer is not None:
                    self._real_buffers.append((module, name, buffer, buffer.clone()))
        for param, state in self._params.items():
            if state.real:
                self._put_away(param, state)
        self._calls = list(self._find_calls(model, set(), set()))

    # -- the calls of the construction ------------------------------------------------------------------------------

    def _find_calls(self, module: nn.Module, seen: set[nn.Module], initialised: set[nn.Module]) -> Iterator[_Call]:
        if module in seen:
            return
        seen.add(module)
        for child in module.children():
            yield from self._find_calls(child, seen, initialised)
        for param in module._parameters.values():
            if param is not None and self._params[param].owner is None:
                self._params[param].owner = module
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None and self._is_concerned(module):
            yield _Call(reset, module, spares=True)
        initialise = getattr(module, "_init_weights", None)
        if initialise is None or not self._is_concerned(module):
            return
        if hasattr(module, "post_init"):  # Hugging Face: not on meta, and before weights are tied
            for inner in _post_order(module):
                if inner not in initialised:
                    initialised.add(inner)
                    yield _Call(partial(initialise, inner), inner, spares=True, final=True)
        elif _required(initialise) == 0:
            yield _Call(initialise, module, spares=False)
        elif _required(initialise) == 1:
            for inner in _post_order(module):
                yield _Call(partial(initialise, inner), inner, spares=False)

    def _concerned(self, module: nn.Module) -> Iterator[tuple[str, str]]:
        """The path of each module inside ``module``, with the names of its own parameters and buffers."""
        for inner in module.modules():
            for name in (*inner._parameters, *inner._buffers):
                yield self._paths[inner], name

    def _is_concerned(self, module: nn.Module) -> bool:
        """Whether anything on ``meta`` is in ``module``."""
        return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))

    @contextmanager
    def _spared(self, call: _Call, make: Callable[[Tensor], Tensor]) -> Iterator[None]:
        own = call.module._parameters
        spared = {
            name: param
            for name, param in own.items()
            if call.spares and param is not None and self._params[param].owner is not call.module
        }
        for name, param in spared.items():
            own[name] = nn.Parameter(make(self._params[param].like), param.requires_grad)
        try:
            yield
        finally:
            own.update(spared)

    # -- parameters come and go -------------------------------------------------------------------------------------

    def _put_away(self, param: nn.Parameter, state: _Param) -> None:
        record = ParamRecord(state.name, 0, _Owner(state.like, partial(self._materialize, param)))
        seal(param, record, torch.empty(0, dtype=state.like.dtype, device="cpu"))

    def _materialize(self, param: nn.Parameter) -> bool:
        if self._here is None:
            return False
        state = self._params[param]
        value = _unset(state.like)
        if state.stored:
            value.copy_(self._store.fetch(state.name))
        make_ordinary(param, value)
        self._here[param] = param._version, value.data_ptr()
        self._writes.watch(value, state)
        return True

    def _run(
        self, initialise: Callable[[], Any], accept: Callable[[nn.Parameter, _Param], bool], *, final: bool = False
    ) -> None:
        """Call ``initialise``, give it in full what it uses, and store the parts that ``accept`` names."""
        here: dict[nn.Parameter, tuple[int, int]] = {}
        kept: set[nn.Parameter] = set()
        self._here = here
        try:
            with torch.no_grad(), self._writes:
                initialise()
            kept.update(param for param in here if accept(param, self._params[param]))
        finally:
            self._here, written = None, self._writes.pop_all()
            for param, (version, address) in here.items():
                state = self._params[param]
                if param not in kept:
                    written.discard(state)
                else:
                    if param._version != version or param.data_ptr() != address:
                        written.add(state)
                    self._keep(param, state)
                self._writes.forget(address)
                self._put_away(param, state)
        for each in written:
            each.written, each.final = True, each.final or final

    def _keep(self, param: nn.Parameter, state: _Param) -> None:
        if param.shape != state.like.shape:
            raise ModelError(
                f"parameter {state.name!r} has shape {tuple(state.like.shape)}, and its initialiser made "
                f"{tuple(param.shape)} of it. Write its values in place."
            )
        self._store.store(state.name)
        state.stored = True

    # -- the construction, once more --------------------------------------------------------------------------------

    def rehearse(self) -> None:
        """Make the calls on ``meta``, to learn which of them the constructor made."""
        with torch.random.fork_rng(devices=[]):
            for call in self._calls:
                if call.final:
                    continue
                params = [param for param in call.module.parameters() if param.is_meta]
                before = [param._version for param in params]
                try:
                    with self._spared(call, _without_memory):
                        self._run(call.initialise, lambda param, state: False)
                except Exception:  # it needs values: a constructor that calls it does not do so on meta
                    continue
                finally:
                    self._place_params(lambda state: False)
                for param, version in zip(params, before, strict=True):
                    state, count = self._params[param], param._version - version
                    if count and state.constructed and state.repeated + count > state.constructed:
                        call.dropped.add(param)
                    else:
                        state.repeated += count
        for buffer in self._buffers.values():
            buffer.repeated = buffer.made._version - buffer.constructed

    def construct(self, given: Collection[str]) -> None:
        """Make the calls with values, but for those that write nothing else than tensors that are ``given``."""
        made: dict[Tensor, Tensor] = {}  # a buffer that two modules hold stays one
        for (module, name), buffer in self._buffers.items():
            fresh = made.setdefault(buffer.made, _unset(buffer.made))
            module._buffers[name] = buffer.made = fresh
            self._writes.watch(fresh, buffer)
        for param, state in self._params.items():
            if not state.real:
                # The object stays: optimizers and ties refer to it. (torch.utils.swap_tensors refuses what has weak
                # references, as the weights of nn.LSTM; here they may stay with the object.)
                nothing = nn.Parameter(torch.zeros((), dtype=param.dtype).expand(param.shape), param.requires_grad)
                torch._C._swap_tensor_impl(param, nothing)
                self._put_away(param, state)
        for call in self._calls:
            if given and all(join(path, name) in given for path, name in self._concerned(call.module)):
                continue
            with self._spared(call, _unset):
                self._run(call.initialise, partial(_is_repeated, call), final=call.final)
        for module, name, tensor, value in self._real_buffers:  # their constructors gave them values
            module._buffers[name] = tensor
            with torch.no_grad():
                tensor.copy_(value)
        self._place_params(lambda state: not state.real)

    def stream(self, values: StreamedWeights) -> None:
        """Store the values of the parameters that ``values`` holds, a part at a time. Collective."""
        for module in _post_order(self._model):
            for name, param in values.params_of(module):
                state = self._params[param]
                like = state.like
                if torch.empty_like(like).stride() != like.stride():  # it will be stored dense
                    like = like.contiguous()
                values.stream(name, like, partial(self._store.put, state.name))
                state.stored = state.written = state.final = True

    def let(self, init_fn: Callable[[nn.Module], Any]) -> None:
        """Show every module to ``init_fn``."""
        for module in _post_order(self._model):
            self._run(partial(init_fn, module), lambda param, state: True, final=True)
        self._place_params(lambda state: True)

    def _place_params(self, is_adopted: Callable[[_Param], bool]) -> None:
        """Where an initialiser replaced a parameter by another, take its values, and let the object stay."""
        for module, name, param in self._places:
            found, state = module._parameters.get(name), self._params[param]
            if found is param:
                continue
            module._parameters[name] = param
            if not is_adopted(state):
                continue
            if found is None or found.is_meta or found.shape != state.like.shape:
                made = "nothing" if found is None else f"a tensor of {tuple(found.shape)} on {found.device}"
                raise ModelError(
                    f"an initialiser put {made} where it found parameter {state.name!r} of "
                    f"{tuple(state.like.shape)}. Let it write the values in place."
                )
            self._run(partial(param.copy_, found), lambda param, state: True, final=True)

    def finish(self) -> None:
        """See that everything has its values.

        Raises:
            ModelError: naming what has not.
        """
        states: list[_State] = [state for state in self._params.values() if not state.real and state.like.numel()]
        states += [
            state
            for (module, name), state in self._buffers.items()
            if module._buffers.get(name) is state.made and state.made.numel()
        ]
        unwritten = [*(state.name for state in states if not state.written), *_on_meta(self._model)]
        if unwritten:
            raise ModelError(
                f"nothing gave these tensors of the model on meta a value: {listed(unwritten, _NAMED)}. Only the "
                f"constructor does: build the model inside `with shardline.empty_weights():` instead, which makes "
                f"buffers and parameters of fewer than min_numel elements for real. Or write them in init_fn= of "
                f"initialize, or in a reset_parameters() of their modules."
            )
        changed = [state.name for state in states if state.constructed > state.repeated and not state.final]
        if changed:
            raise ModelError(
                f"the constructor of the model on meta wrote these tensors in a way that cannot be repeated, outside "
                f"reset_parameters() and _init_weights(): {listed(changed, _NAMED)}. Write them in init_fn= of "
                f"initialize, which runs last, or build the model inside "
                f"`with shardline.empty_weights(min_numel=...):`, which makes smaller ones for real."
            )


def _is_repeated(call: _Call, param: nn.Parameter, state: _Param) -> bool:
    return not state.real and param not in call.dropped


@dataclass(eq=False)
class _Owner:
    """The owner of a parameter like ``like`` whose data is away; one that has its data has no owner."""

    like: Tensor
    on_sealed_access: Callable[[], bool]
    detaches: ClassVar[bool] = False
    advice: ClassVar[str] = "It has its values once initialize is done."
    conversion: ClassVar[str] = "A model is moved or converted before shardline.initialize."

    def on_data_read(self, index: int, alias: Tensor) -> None:
        raise AssertionError("no parameter is shown while a model is filled")

    def on_data_assigned(self, index: int, value: Tensor) -> None:
        raise AssertionError("no parameter is shown while a model is filled")

    def stride_of(self, index: int) -> tuple[int, ...]:
        return self.like.stride()

    def grad_of(self, index: int) -> Tensor | None:
        return None


class _Writes(TorchDispatchMode):
    """Notes which of the watched tensors are written, through whatever view or alias."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watched: dict[int, _State] = {}
        self._found: set[_State] = set()

    def watch(self, tensor: Tensor, state: _State) -> None:
        self._watched[tensor.data_ptr()] = state

    def forget(self, address: int) -> None:
        self._watched.pop(address, None)

    def pop_all(self) -> set[_State]:
        """What was written since the last time."""
        found, self._found = self._found, set()
        return found

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    state = self._watched.get(tensor.untyped_storage().data_ptr()) if tensor is not None else None
                    if state is not None:
                        self._found.add(state)
        return func(*args, **kwargs)


def _like(param: nn.Parameter, data: Tensor) -> nn.Parameter:
    """A parameter of the class and with the attributes of ``param``."""
    made = type(param)(data, param.requires_grad)
    made.__dict__.update(param.__dict__)
    return made


def _without_memory(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")


def _unset(like: Tensor) -> Tensor:
    """A tensor like it on CPU in which values that were not written can be seen."""
    value = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu")
    return value.fill_(float("nan")) if like.is_floating_point() else value.zero_()


def _required(call: Callable[..., Any]) -> int:
    """The number of positional arguments that ``call`` must have."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(call).parameters.values()
    return sum(each.kind in kinds and each.default is inspect.Parameter.empty for each in parameters)


def _on_meta(model: nn.Module) -> Iterator[str]:
    """Tensors on ``meta`` that modules hold as plain attributes, by name; not those that are computed from weights."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, Tensor) and item.is_meta and item.grad_fn is None:
                    yield join(path, name)
                    break


def _post_order(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _post_order(child)
    yield module
