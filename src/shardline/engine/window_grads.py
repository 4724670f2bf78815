"""The gradients of a window between its backwards and its step, where no rank holds them whole.

``.grad`` of a parameter is then a :class:`ShardedGrad`: it has the parameter's shape and no elements. Operations of a
loop between backward and step work on it as on a plain one: norms, which are global; and in-place operations by
elements or numbers, which each rank applies to its own elements. So clipping, by torch or by hand, and
``GradScaler.unscale_`` mean what they mean without an engine. What needs the elements raises and says what to call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import proxy

import torch
from torch import Tensor

from shardline.comm import Comm
from shardline.engine.trainables import Trainables
from shardline.errors import UsageError
from shardline.plan.placement import Placement
from shardline.sharding.bucket import Bucket
from shardline.sharding.buffer import in_storage_order, view
from shardline.sharding.containers import tensors_in
from shardline.sharding.parameter import HARMLESS, called
from shardline.sharding.precision import LossScaler
from shardline.sharding.step import Update
from shardline.sharding.window import Window

__all__ = ["ShardedGrad", "WindowGrads"]

_LINEAR = {"mul_", "div_", "neg_", "__imul__", "__itruediv__", "multiply_", "divide_", "true_divide_"}
"""In-place operations that mean the same of sums over ranks as of averages."""

_BY_ELEMENT = {"clamp_", "clamp_min_", "clamp_max_", "clip_", "nan_to_num_", "sign_", "abs_", "pow_", "sqrt_", "tanh_",
               "add_", "sub_", "__iadd__", "__isub__"}  # fmt: skip
"""Those that are applied to averages."""

_ALIASES = (Tensor.detach, Tensor.data.__get__, torch.detach)  # type: ignore[attr-defined]
"""Those that give the same elements without a graph: of a gradient, itself."""

_NORMS = {"vector_norm", "linalg_vector_norm", "norm"}
_UNSCALE = torch._amp_foreach_non_finite_check_and_unscale_


class ShardedGrad(Tensor):
    """Stands in ``.grad`` of a parameter of the model. See the module."""

    _grads: WindowGrads
    _name: str

    @staticmethod
    def of(name: str, param: Tensor, dtype: torch.dtype, grads: WindowGrads) -> ShardedGrad:
        nothing = torch.full((), float("nan"), dtype=dtype, device=param.device).expand(param.shape)
        made: ShardedGrad = nothing.as_subclass(ShardedGrad)
        made._name, made._grads = name, grads
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = called(func)
        sharded = [tensor for tensor in tensors_in((tuple(args), kwargs)) if isinstance(tensor, ShardedGrad)]
        first = sharded[0]
        if func is _UNSCALE and len(sharded) == len(args[0]):
            return first._grads.unscale([each._name for each in sharded], *args[1:])
        if args and args[0] is first and len(sharded) == 1:
            if func in _ALIASES:
                return first
            numbers = not any(tensor.dim() for tensor in tensors_in((tuple(args[1:]), kwargs)))
            if name in _NORMS and (order := _order(args[1:], kwargs)) is not None:
                return first._grads.norm_of(first._name, order)
            if name == "zero_":
                first._grads.zero(first._name)
                return first
            if name == "copy_" and len(args) == 2 and isinstance(args[1], Tensor) and args[1].shape == first.shape:
                first._grads.put(first._name, args[1])
                return first
            if numbers and name in _LINEAR | _BY_ELEMENT:
                first._grads.change(first._name, func, args[1:], kwargs, averages=name in _BY_ELEMENT)
                return first
        raise UsageError(
            f"{name}: the gradient of parameter {first._name!r} is sharded over the ranks since backward. Norms, "
            f"clipping (engine.clip_grad_norm_(max_norm), torch.nn.utils.clip_grad_norm_) and in-place operations "
            f"with numbers (mul_, clamp_, nan_to_num_) work on it. Read and change elements in engine.before_step(fn), "
            f"or take it whole by engine.parameter({first._name!r}).full_grad()."
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"the gradient of {self._name!r}, sharded over the ranks (shape={tuple(self.shape)})"


def _order(args: Sequence[Any], kwargs: dict[str, Any]) -> float | None:
    """The order of a norm over all elements; None for any other norm."""
    given = {key: value for key, value in kwargs.items() if value is not None and value is not False}
    if len(args) > 1 or not set(given) <= {"ord", "p", "dtype"} or given.get("dtype") not in (None, torch.float32):
        return None
    order = args[0] if args else given.get("ord", given.get("p", 2.0))
    order = 2.0 if order in (None, "fro") else order
    return float(order) if isinstance(order, int | float) and order > 0 else None


class WindowGrads:
    """The gradients of an engine in the current window.

    Args:
        trainables: whose.
        window: the same window from one step to the next.
        comm: of its ranks.
        scaler: the loss scale that they have.
        complete: reduces all that the window holds and is not reduced yet, and says whether there was anything.
            Collective.
    """

    def __init__(
        self, trainables: Trainables, window: Window, comm: Comm, scaler: LossScaler, complete: Callable[[], bool]
    ) -> None:
        self._trainables, self._window, self._comm, self._scaler = trainables, window, comm, scaler
        self._complete_window = complete
        self._stand_ins: dict[str, ShardedGrad] = {}
        self._norms: dict[float, dict[str, Tensor]] = {}

    def stand_in(self, bucket: Bucket, index: int) -> Tensor | None:
        """What ``.grad`` of a parameter of ``bucket`` is; None where no backward gave any."""
        if bucket.grads.reduced is None and bucket.grads.partial is None:
            return None
        name = bucket.plan.entries[index].param.name
        if name not in self._stand_ins:
            self._stand_ins[name] = ShardedGrad.of(name, bucket.params[index], bucket.grads.dtype, proxy(self))
        return self._stand_ins[name]

    # -- what can be done with them -----------------------------------------------------------------------------------

    def norm(self) -> Tensor:
        """The global L2 norm of the averages: a 0-dim float64 tensor. Collective."""
        self._complete()
        squares = self._comm.all_gather_vector(self._update.squares().view(1)).sum()
        return squares.sqrt() / self._divisor()

    def norm_of(self, name: str, order: float) -> Tensor:
        """The norm of one parameter's averages (0-dim fp32). Collective the first time, for all of them at once."""
        self._complete()
        if order not in self._norms:
            self._norms[order] = self._all_norms(order)
        return self._norms[order][name]

    def _all_norms(self, order: float) -> dict[str, Tensor]:
        names = [
            entry.param.name
            for unit in self._trainables.layout.units
            for bucket in unit.trainable
            for entry in bucket.plan.entries
        ]
        own = torch.zeros(len(names), dtype=torch.float64, device=self._update.device)
        places = {name: place for place, name in enumerate(names)}
        found = [(places[name], piece) for name, piece in self._pieces()]
        if found:
            norms = torch.stack([torch.linalg.vector_norm(piece, order, dtype=torch.float64) for _, piece in found])
            own[torch.tensor([place for place, _ in found], device=own.device)] = norms
        rows = torch.linalg.vector_norm(self._comm.all_gather_vector(own), order, dim=0) / self._divisor()
        return dict(zip(names, rows.float().to(self._comm.device).unbind(), strict=True))

    def scale(self, factor: Tensor) -> None:
        """Multiply all gradients by ``factor`` (0-dim)."""
        pieces = [piece for _, piece in self._pieces()]
        if pieces:
            torch._foreach_mul_(pieces, factor.to(pieces[0].device))
        self._norms.clear()

    def change(
        self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], *, averages: bool
    ) -> None:
        """Apply an in-place operation of elements to one parameter's gradient."""
        self._complete()
        if averages:
            self._make_averages()
        for piece in self._pieces_of(name):
            func(piece, *(_beside(piece, each) for each in args), **{k: _beside(piece, v) for k, v in kwargs.items()})
        self._norms.clear()

    def put(self, name: str, value: Tensor) -> None:
        """Make ``value``, whole on every rank, the gradient of one parameter."""
        self._complete()
        self._make_averages()
        _, bucket, entry = self._trainables.layout.where(name)
        if bucket.grads.reduced is None:
            return
        elements, start = in_storage_order(value.detach(), entry), max(entry.offset, bucket.shard.start)
        for piece in self._pieces_of(name):
            piece.copy_(elements[start - entry.offset :][: piece.numel()])
        self._norms.clear()

    def full(self, name: str) -> Tensor | None:
        """A copy of one parameter's average: of its shape, in the dtype in which gradients are added up. Collective.

        None where no backward gave any.
        """
        self._complete()
        unit, bucket, entry = self._trainables.layout.where(name)
        if bucket.grads.reduced is None:
            return None
        own = bucket.shard.own(bucket.grads.reduced)
        return view(bucket.weights.gather(unit.index, own, Placement.SHARDED), entry) / self._divisor()

    def spread(self, name: str) -> None:
        """Bring one parameter's averages to all ranks that update it. Collective."""
        self._complete()
        self._make_averages()
        unit, bucket, _ = self._trainables.layout.where(name)
        bucket.grads.gather(unit.index).wait()

    def zero(self, name: str) -> None:
        """Drop what the window has gathered for one parameter."""
        _, bucket, entry = self._trainables.layout.where(name)
        if bucket.grads.partial is not None:
            bucket.grads.partial[entry.offset : entry.stop].zero_()
        for piece in self._pieces_of(name):
            piece.zero_()
        self._norms.clear()

    def unscale(self, names: Sequence[str], found_inf: Tensor, inv_scale: Tensor) -> None:
        """What ``GradScaler.unscale_`` does with the gradients of ``names``: ``found_inf`` is that of all ranks."""
        self._complete()
        wanted = set(names)
        pieces = [piece for name, piece in self._pieces() if name in wanted]
        if pieces:
            here = pieces[0].device
            found = found_inf.to(here)
            torch._amp_foreach_non_finite_check_and_unscale_(pieces, found, inv_scale.to(here))
            found_inf.copy_(found)
        found_inf.copy_(self._comm.all_gather_vector(found_inf.view(1).double()).amax().view_as(found_inf))
        self._norms.clear()

    def _complete(self) -> None:
        if self._complete_window():
            self._norms.clear()

    # -- where they are -----------------------------------------------------------------------------------------------

    @property
    def _update(self) -> Update:
        return self._trainables.check_trains("using gradients").update

    def _divisor(self) -> float:
        """What the gradients are still to be divided by to be averages without a loss scale."""
        return self._comm.data.size * self._scaler.scale / self._window.divided_by

    def _make_averages(self) -> None:
        if (divisor := self._divisor()) != 1.0:
            pieces = [piece for _, piece in self._pieces()]
            if pieces:
                torch._foreach_div_(pieces, divisor)
            self._window.divided_by *= divisor

    def _pieces(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's own elements of every parameter's gradient."""
        for unit in self._trainables.layout.units:
            for bucket in unit.trainable:
                if bucket.grads.reduced is None:
                    continue
                own, low = bucket.shard.own(bucket.grads.reduced), bucket.shard.start
                for piece in bucket.plan.fragments(low, bucket.shard.stop):
                    start = piece.offset - low
                    yield piece.name, own[start : start + piece.stop - piece.start]

    def _pieces_of(self, name: str) -> list[Tensor]:
        return [piece for each, piece in self._pieces() if each == name]


def _beside(piece: Tensor, value: Any) -> Any:
    return value.to(piece.device) if isinstance(value, Tensor) else value
