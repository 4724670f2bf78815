"""A parameter that is divided over ranks before an engine has it: each rank keeps a range of its elements.

A :class:`Piece` owns the data of one parameter. While the parameter is made, or gathered, it is an ordinary one, whole
on every rank; else it is sealed, as an engine's parameters are. ``initialize`` moves the ranges into its units one
after the other, so the parameter is never whole there.

Ranks divide and gather the same parameters in the same order. Before each of these collectives they compare what they
are about to do, so that ranks which differ raise instead of waiting for each other.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from shardline.comm import Comm, Exchange
from shardline.errors import DisagreementError, ModelError, UsageError, text_of
from shardline.runtime.modes import outside_modes
from shardline.sharding.buffer import flat, owns_its_memory
from shardline.sharding.parameter import ParamRecord, make_ordinary, record_of, seal

__all__ = ["Piece", "Ranks", "check_pieces", "piece_of"]

E = TypeVar("E", bound=Exception)

_KNOWN = "_shardline_known"
"""An attribute of an error that every rank has raised, or was told of."""


class Ranks:
    """The ranks of ``group``, which hold pieces of the same parameters.

    Attributes:
        members: the ranks of the job that they are.
        messages: between them, on a process group of their own.
        count: of the pieces that were made.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.members = tuple(dist.get_process_group_ranks(group))
        self.messages = Exchange.over(group)
        self.count = 0
        weakref.finalize(self, self.messages.close).atexit = False  # then the job is over

    def meet(self, act: str, state: str = "") -> list[str]:
        """See that all ranks are about to do ``act``. Returns each one's ``state``. Collective.

        Raises:
            DisagreementError: if ranks are about to do different things, or one of them failed.
        """
        everyone = self._exchange({"act": act, "state": state})
        for rank, said in enumerate(everyone):
            if said["act"] != everyone[0]["act"]:
                raise self.known(
                    DisagreementError(
                        f"ranks differ in what they do with a sharded model before initialize: rank 0 is about to "
                        f"{everyone[0]['act']}, and rank {rank} to {said['act']}. Make the model alike on every rank; "
                        f"what one rank does alone belongs inside `with shardline.gathered_parameters(...):`."
                    )
                )
        return [said["state"] for said in everyone]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Where this rank fails within it, let the others raise as well, at their next collective."""
        try:
            yield
        except Exception as error:
            if not hasattr(error, _KNOWN):
                self.known(error)
                self.messages.exchange({"failed": f"{type(error).__name__}: {text_of(error)}"})
            raise

    def known(self, error: E) -> E:
        """``error``, which every rank raises here."""
        setattr(error, _KNOWN, True)
        return error

    def _exchange(self, said: dict[str, Any]) -> list[dict[str, Any]]:
        everyone = self.messages.exchange(said)
        for rank, each in enumerate(everyone):
            if "failed" in each:
                raise self.known(DisagreementError(f"rank {rank} failed while the model was made: {each['failed']}"))
        return everyone


class Piece:
    """This rank's range of one parameter's elements, and the owner of its data.

    The parameter stays whole at first, with the data that it has; :meth:`divide` follows.

    Args:
        param: no engine has it.
        name: what errors call it.
        ranks: among which it is divided.
        may_gather: whether a use of the sealed parameter gathers it now, on all ranks alike; it has done so if it
            returns True.

    Attributes:
        index: the same on every rank.
        elements: this rank's, 1-D, in the order of storage; None while there are none.
        shape, stride, dtype, device: of the parameter, when it was divided.
    """

    detaches: ClassVar[bool] = True
    advice: ClassVar[str] = (
        "Read or change it inside `with shardline.gathered_parameters(...):` (write=True to change it), or give the "
        "model to shardline.initialize as it is."
    )
    conversion: ClassVar[str] = (
        "A model is moved or converted inside `with shardline.sharded_weights():`, where it is made."
    )

    def __init__(
        self,
        param: nn.Parameter,
        name: str,
        ranks: Ranks,
        may_gather: Callable[[Piece], bool],
    ) -> None:
        self.name, self.ranks, self.index = name, ranks, ranks.count
        self.elements: Tensor | None = None
        self._may_gather = may_gather
        self._param = weakref.ref(param)
        self._record = ParamRecord(name, 0, self)
        ranks.count += 1
        self._note(param)
        _WHOLE[param] = self

    def _note(self, value: Tensor) -> None:
        self.shape, self.stride, self.dtype, self.device = value.shape, value.stride(), value.dtype, value.device

    @property
    def param(self) -> nn.Parameter:
        """The parameter."""
        param = self._param()
        if param is None:
            raise AssertionError(f"{self.name} is gone, and its piece is used")
        return param

    @property
    def is_whole(self) -> bool:
        """Whether the parameter is whole here."""
        return self.param in _WHOLE

    @property
    def cuts(self) -> list[int]:
        """Of the ranges, one more than ranks."""
        size, numel = len(self.ranks.members), self.shape.numel()
        return [numel * rank // size for rank in range(size + 1)]

    @property
    def own(self) -> slice:
        """This rank's range."""
        low, high = self.cuts[self.ranks.messages.rank :][:2]
        return slice(low, high)

    # -- divided and gathered ---------------------------------------------------------------------------------------

    @outside_modes
    def divide(self, *, source: int = 0, shared: bool = False) -> bool:
        """Keep this rank's range of the values of rank ``source``, and seal the parameter. Collective.

        Args:
            shared: also where something else lies in its memory on some rank.

        Returns:
            Whether it did, or has nothing to keep, since the parameter is gone on some rank.
        """
        param = self._param()
        with torch.no_grad():
            states = self.ranks.meet(f"divide {self._called}", _state_of(param, shared=shared))
            if param is None or _GONE in states:
                self.leave()
                return True
            if _IN_USE in states:
                return False
            if len(set(states)) > 1:
                found = ", ".join(f"rank {rank} has {each}" for rank, each in enumerate(states))
                raise self.ranks.known(
                    DisagreementError(f"{self._called} differs: {found}. Make the model alike on every rank.")
                )
            value = _dense(param.detach())
            self.ranks.messages.broadcast([value], source)
            self._note(value)
            self.elements = None  # those of before, if they were kept, are not there beside the new ones
            self.elements = flat(value)[self.own].clone()
            self._seal(value)
            return True

    def _seal(self, like: Tensor) -> None:
        _WHOLE.pop(self.param, None)
        seal(self.param, self._record, like)

    def leave(self) -> None:
        """Let the parameter, which is whole, be as any other."""
        param = self._param()
        if param is not None:
            _WHOLE.pop(param, None)

    @outside_modes
    def gather(self, *, keep: bool = False) -> None:
        """Make the parameter whole on every rank; ``keep`` this rank's elements beside it. Collective."""
        if self.elements is None:
            raise AssertionError(f"{self.name} has no elements to gather")
        self.ranks.meet(f"gather {self._called}")
        with torch.no_grad():
            full = torch.empty(self.shape.numel(), dtype=self.dtype, device=self.device)
            full[self.own].copy_(self.elements)
            self.ranks.messages.gather(full, self.cuts)
            if not keep:
                self.elements = None
            make_ordinary(self.param, full.as_strided(self.shape, self.stride))
            _WHOLE[self.param] = self

    @outside_modes
    def differs(self) -> bool:
        """Whether this rank's elements of the parameter, which is whole, are others than those that were kept."""
        value = self.param.detach()
        if (value.shape, value.stride(), value.dtype) != (self.shape, self.stride, self.dtype) or self.elements is None:
            return True
        with torch.no_grad():  # by bytes: NaN is as good as another value
            return not torch.equal(flat(value)[self.own].view(torch.uint8), self.elements.view(torch.uint8))

    def seal(self) -> None:
        """Seal the parameter again, with the elements that were kept."""
        self._seal(torch.empty(0, dtype=self.dtype, device=self.device))

    def pour(self, comm: Comm, store: Callable[[int, Tensor], None]) -> None:
        """Give every range to ``store``, with its first element, and keep nothing. Collective."""
        if self.elements is None:
            raise AssertionError(f"{self.name} has no elements to give")
        for rank, (start, stop) in enumerate(pairwise(self.cuts)):
            mine = rank == comm.data.rank
            part = self.elements if mine else torch.empty(stop - start, dtype=self.dtype, device=self.device)
            comm.messages.broadcast([part], rank)
            store(start, part)
            comm.wait_for_readers()
        self.elements = None

    @property
    def _called(self) -> str:
        return f"parameter {self.index} ({self.name})"

    # -- parameter.Owner --------------------------------------------------------------------------------------------

    def sealed_access(self) -> bool:
        return self._may_gather(self)

    def handed_out(self, index: int, alias: Tensor) -> None:
        raise AssertionError("a piece shows no parameter: it is sealed, or its own")

    def assigned(self, index: int, value: Tensor) -> None:
        raise AssertionError("a piece shows no parameter: it is sealed, or its own")

    def stride_of(self, index: int) -> tuple[int, ...]:
        return tuple(self.stride)

    def grad_of(self, index: int) -> Tensor | None:
        return None


def piece_of(tensor: Tensor) -> Piece | None:
    """The piece of a parameter that is divided before there is an engine."""
    record = record_of(tensor)
    if record is None:
        found: Piece | None = _WHOLE.get(tensor)
        return found
    return record.owner if isinstance(record.owner, Piece) else None


_WHOLE = WeakTensorKeyDictionary()
"""The pieces of parameters that are whole for now."""


def check_pieces(params: Iterable[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """See that an engine among the ranks of ``group`` can take the pieces of ``params`` over.

    Raises:
        UsageError: if one is whole now, or is divided among other ranks.
        ModelError: for one that was lost by a failed ``initialize``.
    """
    members = () if group is None else tuple(dist.get_process_group_ranks(group))
    for param in params:
        piece = piece_of(param)
        if piece is None:
            continue
        if piece.is_whole:
            raise UsageError(
                "initialize was called inside sharded_weights() or gathered_parameters(), where parameters are whole. "
                "Call it after them."
            )
        if piece.ranks.members != members:
            raise UsageError(
                f"the model was sharded over the ranks {_listed(piece.ranks.members)}, and initialize shards over "
                f"{_listed(members)}. Give sharded_weights() and initialize() the same mesh=."
            )
        if piece.elements is None:
            raise ModelError(
                f"parameter {piece.name!r} lost its values in an initialize that failed. Make the model again."
            )


def _state_of(param: nn.Parameter | None, *, shared: bool) -> str:
    if param is None:
        return _GONE
    return f"{tuple(param.shape)} of {param.dtype}" if shared or owns_its_memory(param) else _IN_USE


_GONE, _IN_USE = "gone", "in use"


def _listed(ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "") if ranks else "of no group"


def _dense(value: Tensor) -> Tensor:
    """``value`` in memory that its elements fill."""
    ordered = sorted((stride, size) for stride, size in zip(value.stride(), value.shape, strict=True) if size != 1)
    expected = 1
    for stride, size in ordered:
        if stride != expected:
            return value.contiguous()
        expected *= size
    return value
