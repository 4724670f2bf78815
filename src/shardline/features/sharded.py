"""A model that is sharded over the ranks while it is made, before there is an engine.

Constructors run unchanged, on whole tensors and with their own random numbers. The memory of whole parameters is
bounded: before an allocation would exceed the bound, the parameters that were used longest ago are sharded, and one
that is used again is gathered again. Three hooks are enough for that:

* one of ``nn.Module`` on the registration of parameters, which makes each a
  :class:`shardline.sharding.sharded_param.ShardedParam`, and one on their deep copies, which are registered nowhere;
* a function mode, which sees the parameters that an operation in progress uses: these stay;
* a dispatch mode, which sees an allocation before it is made.

A parameter whose memory another tensor uses (a view, a ``.data``, what autograd saved) stays whole as long as that
tensor exists, so nothing that is written to it is lost.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from shardline.errors import UsageError
from shardline.runtime.modes import outside_modes
from shardline.runtime.process_group import init_distributed
from shardline.sharding.containers import tensors_in
from shardline.sharding.parameter import HARMLESS, record_of
from shardline.sharding.sharded_param import ShardedParam, ShardGroup, sharded_param_of

__all__ = ["edited", "make_room", "shard_parameters", "sharded_weights"]


@contextmanager
def sharded_weights(mesh: Any = None) -> Iterator[None]:
    """Within it, models are made that are sharded over the ranks from the beginning. Collective.

    Each rank keeps its part of every parameter, and at most one large parameter whole::

        with shardline.sharded_weights():
            model = Net()
        engine, *_ = shardline.initialize(model=model, config="config.json")

    Constructors run as without it, on whole tensors on the device on which they make them, with the same random
    numbers; all ranks run them alike, and rank 0's values count. What they do to a parameter that was sharded already
    (``self.apply(self._init_weights)``, ``.to(dtype)``, a deep copy, ``load_state_dict``) gathers it for as long as it
    takes. After the block parameters are sealed: shape, dtype and device are true, a use raises :class:`SealedError`,
    and :func:`shardline.gathered_parameters` makes them whole for a while. Not sharded are lazy parameters, those on
    ``meta`` and those that share their memory with another tensor. On one rank nothing is.

    Args:
        mesh: as that of :func:`initialize`.

    Raises:
        DisagreementError: if ranks make different models, or one of them fails.
    """
    ranks = _ranks(mesh)
    if ranks is None or _Construction.here() is not None:
        yield
        return
    construction = _Construction(ranks)
    with construction.watching():
        yield


def make_room(size: int) -> None:
    """Within :func:`sharded_weights`, shard parameters before ``size`` bytes come that torch does not allocate.

    Collective: every rank calls it alike.
    """
    construction = _Construction.here()
    if construction is not None:
        construction.make_room(size)


def shard_parameters(params: Iterable[nn.Parameter], mesh: Any = None) -> None:
    """Shard parameters that exist over the ranks, as :func:`sharded_weights` does. Collective."""
    ranks = _ranks(mesh)
    if ranks is None:
        return
    construction = _Construction(ranks)
    for param in params:
        construction.track(param, f"{type(param).__name__} of {tuple(param.shape)}")
        construction.finish()


def _ranks(mesh: Any) -> ShardGroup | None:
    """The ranks of ``mesh``, or all; None for a single one."""
    init_distributed()
    group = dist.group.WORLD if mesh is None else mesh.get_group()
    return None if group is None or dist.get_world_size(group) == 1 else ShardGroup(group)


@contextmanager
def edited(params: Iterable[Tensor], source: int | None) -> Iterator[None]:
    """Within it those of ``params`` that are sharded without an engine are whole. Collective.

    At its end the values of rank ``source`` are kept on every rank.

    Others are left as they are.

    Raises:
        UsageError: for a change without a ``source``.
    """
    held = list(params)  # they live on, also where the block replaces them in their modules
    found = {sharded for param in held if (sharded := sharded_param_of(param)) is not None and not sharded.is_whole}
    hidden = sorted(found, key=attrgetter("index"))  # the same order on every rank
    groups = dict.fromkeys(sharded.ranks for sharded in hidden)
    construction = _Construction.here()
    with ExitStack() as around:
        if construction is not None:
            around.enter_context(construction.suspended())
        for ranks in groups:
            around.enter_context(ranks.propagate_errors())
        around.callback(_seal_again, hidden)
        for sharded in hidden:
            sharded.gather(keep=True)
        versions = [sharded.param._version for sharded in hidden]
        yield
        if source is not None:
            for sharded in hidden:
                sharded.shard(source=source, shared=True)
            return
        changed = [
            sharded
            for sharded, version in zip(hidden, versions, strict=True)
            if sharded.param._version != version or sharded.has_changed()
        ]
        for ranks in groups:
            names = ranks.agree_on(
                "end gathered_parameters()", next((each.name for each in changed if each.ranks is ranks), "")
            )
            if any(names):
                raise ranks.mark_raised(
                    UsageError(
                        f"parameter {next(filter(None, names))!r} was changed inside gathered_parameters(). Pass "
                        f"write=True to keep changes on every rank."
                    )
                )


def _seal_again(gathered: Iterable[ShardedParam]) -> None:
    for sharded in gathered:
        if sharded.is_whole:
            sharded.seal()


class _Construction:
    """The parameters that this thread constructs within :func:`sharded_weights`.

    Attributes:
        in_use: the parameters of operations in progress, innermost last.
    """

    _threads = threading.local()

    def __init__(self, ranks: ShardGroup) -> None:
        self._ranks = ranks
        self._whole: dict[ShardedParam, int] = {}  # with their bytes, in the order of their last gather
        self._largest = 0
        self._waits = False
        self.in_use: list[Sequence[Tensor]] = []

    @classmethod
    def here(cls) -> _Construction | None:
        """The one of this thread."""
        return getattr(cls._threads, "construction", None)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it parameters are sharded as memory is needed; at the end, all of them."""
        self._threads.construction = self
        handle = register_module_parameter_registration_hook(self._register)
        try:
            with self._ranks.propagate_errors():
                with _copies_tracked(), _Uses(self), _Allocations(self):
                    yield
                self._ranks.agree_on("end sharded_weights()")
                self.finish()
        finally:
            handle.remove()
            self._threads.construction = None
            for sharded in self._whole:
                sharded.unmanage()
            self._whole.clear()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within it nothing is sharded, and no use gathers: ranks may do different things."""
        before, self._waits = self._waits, True
        try:
            yield
        finally:
            self._waits = before

    def _register(self, module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and _Construction.here() is self:
            self.track(param, f"{type(module).__name__}.{name}")

    @outside_modes
    def track(self, param: nn.Parameter, name: str) -> None:
        """Shard ``param`` when its memory is needed."""
        lazy = isinstance(param, nn.parameter.UninitializedParameter)
        if lazy or param.is_meta or is_traceable_wrapper_subclass(param):
            return
        if record_of(param) is not None or sharded_param_of(param) is not None:
            return
        if param.layout is not torch.strided or param.is_complex():
            return  # initialize raises an error for these
        self._hold(ShardedParam(param, name, self._ranks, self._gather))

    def _hold(self, sharded: ShardedParam) -> None:
        self._whole[sharded] = sharded.param.nbytes
        self._largest = max(self._largest, sharded.param.nbytes)

    def _gather(self, sharded: ShardedParam) -> bool:
        """Gather ``sharded`` for a use, if the ranks are alike here."""
        if self._waits or _Construction.here() is not self:
            return False
        self.make_room(sharded.param.nbytes)
        sharded.gather()
        self._hold(sharded)
        return True

    @outside_modes
    def make_room(self, size: int) -> None:
        """Shard what was used longest ago, for ``size`` bytes. Biases and the like may stay beside a large tensor."""
        if self._waits:
            return
        total = sum(self._whole.values())
        limit = max(self._largest, size) * 9 // 8
        used = {sharded_param_of(tensor) for tensors in self.in_use for tensor in tensors}
        for sharded, held in list(self._whole.items()):
            if total + size <= limit:
                break
            if sharded not in used and sharded.shard():
                del self._whole[sharded]
                total -= held

    @outside_modes
    def finish(self) -> None:
        """Shard all; what shares its memory is left as it is."""
        left = [sharded for sharded in self._whole if not sharded.shard()]
        if left:
            gc.collect()
        for sharded in left:
            if not sharded.shard():
                sharded.unmanage()
        self._whole.clear()


@contextmanager
def _copies_tracked() -> Iterator[None]:
    """Within it the construction of a thread has the deep copies, too: copying a module registers no parameter."""
    kind: Any = nn.Parameter
    deepcopy = kind.__deepcopy__

    @wraps(deepcopy)
    def copy(self: nn.Parameter, memo: dict[int, Any]) -> Any:
        made = deepcopy(self, memo)
        construction = _Construction.here()
        if construction is not None:
            construction.track(made, f"a copy of {tuple(made.shape)}")
        return made

    kind.__deepcopy__ = copy
    try:
        yield
    finally:
        kind.__deepcopy__ = deepcopy


class _Uses(TorchFunctionMode):
    """Records which tensors the operations in progress use."""

    def __init__(self, construction: _Construction) -> None:
        super().__init__()
        self._construction = construction

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in HARMLESS:
            return func(*args, **kwargs)
        self._construction.in_use.append(tensors_in((args, kwargs)))
        try:
            return func(*args, **kwargs)
        finally:
            self._construction.in_use.pop()


class _Allocations(TorchDispatchMode):
    """Lets a construction make room before an operation allocates."""

    def __init__(self, construction: _Construction) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._construction = construction

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._construction.in_use and _allocates(func):  # else an operation that was not recorded may be in progress
            self._construction.make_room(_size(func, args, kwargs))
        return func(*args, **kwargs)


@cache
def _allocates(func: Any) -> bool:
    """Whether an operation gives a tensor of its own, no view and no argument."""
    return any(each.alias_info is None and "Tensor" in str(each.type) for each in func._schema.returns)


def _size(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """About the bytes that ``func`` allocates: from its argument ``size``, else those of its largest tensor."""
    if kwargs.get("device") == torch.device("meta"):
        return 0
    for index, argument in enumerate(func._schema.arguments):
        if argument.name == "size":
            size = args[index] if index < len(args) else kwargs["size"]
            return torch.Size(size).numel() * (kwargs.get("dtype") or torch.get_default_dtype()).itemsize
    return max((tensor.nbytes for tensor in tensors_in((args, kwargs)) if not tensor.is_meta), default=0)
