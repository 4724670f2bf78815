"""The class of a parameter while an engine manages it: it records what is done to it.

A managed parameter is *shown*, its data a view of a flat buffer, or *sealed*, its data away. In either state its class
is one made for the purpose from the class that it had, so a subclass of ``nn.Parameter`` stays what it is.

* :func:`show` gives it its data. The class records what raises no version: that ``.data`` was read, whose writes
  autograd does not count, and that ``.data`` was assigned. All else is done by torch as before, at its own speed.
* In both states ``.grad`` is what autograd has left there and, once the engine has collected that, what its owner says.
* :func:`seal` takes its data away. Shape, dtype and device stay true; reading or writing it either gathers its unit
  (during a forward) or raises :class:`SealedError` with its name. It can never crash the process, as reading a view of
  a freed storage would.
* :func:`make_ordinary` makes it a parameter as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from shardline.errors import SealedError

__all__ = [
    "HARMLESS",
    "Owner",
    "ParamRecord",
    "assign",
    "autograd_grad",
    "called",
    "has_own_attributes",
    "is_sealed",
    "make_ordinary",
    "record_of",
    "seal",
    "set_grad",
    "show",
]


class Owner(Protocol):
    """Keeps the data of parameters, and is called when users access them.

    ``index`` says which of the owner's parameters it is.

    Attributes:
        detaches: whether ``detach()`` of a sealed parameter gives a tensor that is as sealed (so a state dict has its
            names and shapes), instead of raising.
        advice: what to do instead of using a sealed parameter.
        conversion: where a model is moved or converted.
    """

    detaches: ClassVar[bool]
    advice: ClassVar[str]
    conversion: ClassVar[str]

    def on_sealed_access(self) -> bool:
        """A sealed parameter is accessed. Gathers it if all ranks do so now, and returns whether it did."""

    def on_data_read(self, index: int, alias: Tensor) -> None:
        """``alias``, the ``.data`` of a shown parameter, was read: what is written to it raises no version."""

    def on_data_assigned(self, index: int, value: Tensor) -> None:
        """``.data = value`` was written for a shown parameter. Raises where that cannot be."""

    def stride_of(self, index: int) -> tuple[int, ...]:
        """The strides under which a sealed parameter is stored."""

    def grad_of(self, index: int) -> Tensor | None:
        """The gradient that was collected of ``.grad``; None if none was. Raises where it is not whole."""


@dataclass(frozen=True)
class ParamRecord:
    """Where a managed parameter belongs: its name, its owner, and its index there."""

    name: str
    index: int
    owner: Owner


def show(param: nn.Parameter, data: Tensor, record: ParamRecord) -> None:
    """Make ``param`` a view: ``data``, in a buffer of its owner."""
    managed: Any = param
    managed.__class__, managed._shardline = _classes(param)[0], record
    assign(param, data)


def seal(param: nn.Parameter, record: ParamRecord, like: Tensor) -> None:
    """Take ``param``'s data away, leaving its metadata true: its shape, and dtype and device of the buffer ``like``.

    Its owner may bring the data back when it is accessed.
    """
    if is_sealed(param) and record_of(param) is record:
        return
    assign(param, _filler(like.dtype, like.device).expand(param.shape))
    managed: Any = param
    managed.__class__, managed._shardline = _classes(param)[1], record


def make_ordinary(param: nn.Parameter, data: Tensor) -> None:
    """Make ``param`` a parameter of its own class again, with ``data``."""
    managed: Any = param
    if record_of(param) is not None:
        managed.__class__ = type(managed)._unmanaged
        del managed._shardline
    assign(param, data)


def assign(param: nn.Parameter, data: Tensor) -> None:
    """``param.data = data``, whatever the class of ``param``."""
    with torch._C.DisableTorchFunctionSubclass(), torch._C._InferenceMode(False):
        _DATA.__set__(param, data)


def record_of(tensor: Tensor) -> ParamRecord | None:
    """The record of ``tensor``, if an engine manages it."""
    return tensor.__dict__.get("_shardline") if hasattr(type(tensor), "_unmanaged") else None


def is_sealed(param: Tensor) -> bool:
    """Whether ``param``'s data is away."""
    return isinstance(param, _Sealed)


def has_own_attributes(param: nn.Parameter) -> bool:
    """Whether ``param`` is more than what ``nn.Parameter`` makes: by its class, or by attributes of its own."""
    kind = getattr(type(param), "_unmanaged", type(param))
    return kind is not nn.Parameter or bool(param.__dict__.keys() - {"_shardline"})


_DATA: Any = torch._C.TensorBase.data
_GRAD: Any = torch._C.TensorBase.grad

autograd_grad: Callable[[Tensor], Tensor | None] = _GRAD.__get__
"""What autograd has left in ``.grad`` and was not collected yet. To be called without torch functions."""

set_grad: Callable[[Tensor, Tensor | None], None] = _GRAD.__set__
"""``.grad = value`` as autograd does it."""


@cache
def _filler(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        value = float("nan") if dtype.is_floating_point or dtype.is_complex else 0
        return torch.full((), value, dtype=dtype, device=device)


def _classes(param: nn.Parameter) -> tuple[type[nn.Parameter], type[nn.Parameter]]:
    kind = type(param)
    return _make_classes(getattr(kind, "_unmanaged", kind))


@cache
def _make_classes(original: type[nn.Parameter]) -> tuple[type[nn.Parameter], type[nn.Parameter]]:
    """The classes of a parameter of class ``original`` while it is shown, and while it is sealed."""
    inherited: Any = original.data  # its own, where a subclass has one

    def read(self: Any) -> Tensor:
        alias: Tensor = inherited.__get__(self)
        record: ParamRecord = self._shardline
        record.owner.on_data_read(record.index, alias)
        return alias

    def write(self: Any, value: Tensor) -> None:
        if value is not self:  # as Module.to writes where nothing changes
            record: ParamRecord = self._shardline
            record.owner.on_data_assigned(record.index, value)

    def read_grad(self: Any) -> Tensor | None:
        with torch._C.DisableTorchFunctionSubclass():
            grad = autograd_grad(self)
        if grad is not None or torch._guards.TracingContext.try_get() is not None:  # compilers must not trace the seal
            return grad
        record: ParamRecord = self._shardline
        return record.owner.grad_of(record.index)

    def write_grad(self: Any, value: Tensor | None) -> None:
        collected = read_grad(self)
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            if collected is None or autograd_grad(self) is not None:
                set_grad(self, value)
                return
        with torch.no_grad():  # what stands for a sharded gradient has functions of its own
            if value is None:
                collected.zero_()
            elif value is not collected:
                collected.copy_(value)

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        """A copy has no owner: ``type(param)(data)`` is how parameters are copied."""
        return original(*args, **kwargs)

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        with _plain(self):
            return self.__deepcopy__(memo)

    def reduce(self: Any, protocol: Any) -> Any:
        with _plain(self):
            return _apart(self.__reduce_ex__(protocol), self.__dict__)

    names = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "_unmanaged": original,
        "grad": property(read_grad, write_grad, lambda self: write_grad(self, None)),
    }
    shown = {"data": property(read, write), "__new__": new, "__deepcopy__": deepcopy, "__reduce_ex__": reduce}
    meta: Any = type(original)
    return meta(original.__name__, (original,), names | shown), meta(original.__name__, (_Sealed, original), names)


@contextmanager
def _plain(param: Any) -> Iterator[None]:
    """Within it a shown parameter looks as if no engine managed it: what is made from it then refers to no engine."""
    kind, record = param.__class__, param.__dict__.pop("_shardline")
    param.__class__ = kind._unmanaged
    try:
        yield
    finally:
        param.__class__, param._shardline = kind, record


def _apart(reduced: Any, own: dict[str, Any]) -> Any:
    """``reduced`` with a copy instead of ``own``, which gets its record back before it is pickled."""
    if isinstance(reduced, tuple):
        return tuple(_apart(each, own) for each in reduced)
    return dict(own) if reduced is own else reduced


# -- the seal ---------------------------------------------------------------------------------------------------------

_DESCRIPTORS = ("shape", "dtype", "device", "requires_grad", "grad", "is_leaf", "layout", "ndim", "names", "_version",
                "is_meta", "is_sparse", "is_quantized", "is_cuda", "is_cpu", "grad_fn", "nbytes", "itemsize",
                "_backward_hooks", "_post_accumulate_grad_hooks", "retains_grad", "output_nr", "is_nested", "is_mps",
                "is_xpu", "grad_dtype", "is_inference", "is_mkldnn", "is_sparse_csr", "name")  # fmt: skip
_METHODS = ("size", "numel", "nelement", "dim", "ndimension", "element_size", "get_device", "is_floating_point",
            "is_complex", "__len__", "__hash__", "requires_grad_", "register_hook", "is_signed",
            "register_post_accumulate_grad_hook", "is_inference", "new", "new_empty", "new_zeros",
            "new_ones")  # fmt: skip
_FUNCTIONS = ("numel", "is_floating_point", "is_complex", "is_signed", "empty_like", "zeros_like", "ones_like",
              "rand_like", "randn_like", "randint_like", "result_type",
              "_has_compatible_shallow_copy_type")  # fmt: skip


def _harmless() -> frozenset[Any]:
    """Functions that work on a sealed parameter: they do not read its elements."""
    found: set[Any] = set()
    for name in _DESCRIPTORS:
        descriptor = getattr(Tensor, name, None)
        for access in ("__get__", "__set__", "__delete__"):
            if descriptor is not None and hasattr(descriptor, access):
                found.add(getattr(descriptor, access))
    found.update(getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name))
    found.update(getattr(torch, name) for name in _FUNCTIONS)
    return frozenset(found)


HARMLESS = _harmless()
_LIKE_OTHER = frozenset({Tensor.to, Tensor.type_as, Tensor.view_as, Tensor.expand_as, Tensor.reshape_as})
"""They look at the elements of the first argument alone."""
_LIKE_SELF = frozenset({Tensor.new_full, Tensor.new_tensor, torch.full_like})
"""They look at those of all others."""
_CASTS = {
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
}


class _Sealed(Tensor):
    """What has no elements here: a parameter whose data is away, or the ``.data`` that was read of one."""

    _shardline: ParamRecord

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.stride and is_sealed(args[0]):
            strides = args[0]._shardline.owner.stride_of(args[0]._shardline.index)
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            return strides if dim is None else strides[dim]
        if func not in HARMLESS and not (func is Tensor.type and len(args) == 1 and not kwargs):
            if _changes_nothing(func, args, kwargs):
                return args[0]
            looked_at = args[:1] if func in _LIKE_OTHER else args[1:] if func in _LIKE_SELF else args
            for tensor in _sealed_among((*looked_at, *(() if func in _LIKE_OTHER else kwargs.values()))):
                # Gathering shows a whole unit, so a later one of the arguments may be here already.
                if is_sealed(tensor) and not tensor._unseal():
                    if func is Tensor.detach and tensor._shardline.owner.detaches:
                        return tensor._placeholder()
                    raise _error(tensor, called(func))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def _unseal(self) -> bool:
        return self._shardline.owner.on_sealed_access()

    def _placeholder(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False):
            alias: Any = Tensor._make_subclass(_SealedData, _DATA.__get__(self))
        alias._shardline = self._shardline
        return alias  # type: ignore[no-any-return]

    @property
    def data(self) -> Tensor:
        """The data, where it can be gathered now; else a tensor that is as sealed."""
        return self.data if self._unseal() else self._placeholder()

    @data.setter
    def data(self, value: Tensor) -> None:
        if value is self:
            return
        if not self._unseal():
            raise _error(self, "assigning .data")
        self.data = value

    def __repr__(self) -> str:  # type: ignore[override]
        return (
            f"Parameter {self._shardline.name!r}, sharded: not gathered here "
            f"(shape={tuple(self.shape)}, dtype={self.dtype}, requires_grad={self.requires_grad})"
        )

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._unseal():
            return self.__deepcopy__(memo)
        raise _error(self, "copying")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise _error(self, "pickling")


class _SealedData(_Sealed):
    """The ``.data`` of a sealed parameter: a gather would not bring it here, since it is none of the parameters."""

    def _unseal(self) -> bool:
        return False

    @property
    def data(self) -> Tensor:
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        raise _error(self, "assigning .data")


def _error(tensor: Any, operation: str) -> SealedError:
    converts = operation in ("to", "cpu", "cuda", "type", *(cast.__name__ for cast in _CASTS))
    owner = tensor._shardline.owner
    return SealedError(
        f"{operation}: parameter {tensor._shardline.name!r} is sharded and not gathered here. {owner.advice}"
        + (f" {owner.conversion}" if converts else "")
    )


def called(func: Any) -> str:
    """What a user wrote: an attribute's own name, not that of the method which reads it."""
    name = str(getattr(func, "__name__", func))
    return f".{func.__self__.__name__}" if name in ("__get__", "__set__", "__delete__") else name


def _changes_nothing(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether ``func`` is a conversion of a sealed tensor to what it is already, which gives the tensor itself."""
    tensor = args[0] if args else None
    if not isinstance(tensor, _Sealed):
        return False
    dtype, device = _CASTS.get(func), None
    if func is Tensor.cpu and not kwargs and len(args) == 1:
        device = torch.device("cpu")
    elif func is Tensor.to:
        try:
            device, dtype, _, memory_format = torch._C._nn._parse_to(*args[1:], **kwargs)
        except (TypeError, RuntimeError):  # it asks for a copy, or is wrong
            return False
        if memory_format is not None:
            return False
    elif dtype is None or kwargs or len(args) > 1:
        return False
    same_place = device is None or (device.type == tensor.device.type and device.index in (None, tensor.device.index))
    return same_place and dtype in (None, tensor.dtype)


def _sealed_among(values: Iterable[Any]) -> list[Any]:
    found = []
    for value in values:
        if isinstance(value, _Sealed):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(_sealed_among(value))
    return found
