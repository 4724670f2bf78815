"""A parameter that is sharded over ranks before an engine has it: each rank keeps a range of its elements.

A :class:`ShardedParam` owns the data of one parameter. While the parameter is constructed or gathered it is an
ordinary one, whole on every rank; otherwise it is sealed, as an engine's parameters are. ``initialize`` moves the
ranges into its units one after the other, so the parameter is never whole there.

Ranks shard and gather the same parameters in the same order. Before each of these collectives they compare what they
are about to do, so ranks that differ raise an error instead of a deadlock.
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
from shardline.names import ranks_text
from shardline.runtime.modes import outside_modes
from shardline.sharding.buffer import flat, owns_its_memory
from shardline.sharding.parameter import ParamRecord, make_ordinary, record_of, seal

__all__ = ["ShardGroup", "ShardedParam", "check_sharded_params", "sharded_param_of"]

E = TypeVar("E", bound=Exception)

_RAISED = "_shardline_raised_on_all_ranks"
"""An attribute of an error that every rank raises, or that was sent to every rank."""


class ShardGroup:
    """The ranks of ``group``, over which parameters are sharded.

    Attributes:
        members: the ranks of the job that they are.
        messages: between them, on a process group of their own.
        count: how many parameters were sharded over them.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.members = tuple(dist.get_process_group_ranks(group))
        self.messages = Exchange.over(group)
        self.count = 0
        weakref.finalize(self, self.messages.close).atexit = False  # then the job is over

    def agree_on(self, action: str, state: str = "") -> list[str]:
        """Check that all ranks are about to do ``action``. Returns each one's ``state``. Collective.

        Raises:
            DisagreementError: if ranks are about to do different things, or one of them failed.
        """
        messages = self._exchange({"action": action, "state": state})
        first = messages[0]["action"]
        for rank, message in enumerate(messages):
            if message["action"] != first:
                raise self.mark_raised(
                    DisagreementError(
                        f"ranks differ in what they do with a sharded model before initialize: rank 0 is about to "
                        f"{first}, and rank {rank} to {message['action']}. Make the model alike on every rank; "
                        f"what one rank does alone belongs inside `with shardline.gathered_parameters(...):`."
                    )
                )
        return [message["state"] for message in messages]

    @contextmanager
    def propagate_errors(self) -> Iterator[None]:
        """An error within it is raised on the other ranks as well, at their next collective."""
        try:
            yield
        except Exception as error:
            if not hasattr(error, _RAISED):
                self.mark_raised(error)
                self.messages.exchange({"failed": f"{type(error).__name__}: {text_of(error)}"})
            raise

    def mark_raised(self, error: E) -> E:
        """``error``, which every rank raises here: :meth:`propagate_errors` does not send it."""
        setattr(error, _RAISED, True)
        return error

    def _exchange(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        messages = self.messages.exchange(own)
        for rank, message in enumerate(messages):
            if "failed" in message:
                raise self.mark_raised(
                    DisagreementError(f"rank {rank} failed while the model was made: {message['failed']}")
                )
        return messages


class ShardedParam:
    """This rank's range of one parameter's elements, and the owner of its data.

    The parameter stays whole at first, with the data that it has; :meth:`shard` follows.

    Args:
        param: not managed by an engine.
        name: its name in errors.
        ranks: over which it is sharded.
        may_gather: whether a use of the sealed parameter gathers it now, on all ranks alike; it has done so if it
            returns True.

    Attributes:
        index: the same on every rank.
        elements: this rank's, 1-D, in the order of storage; None while there are none.
        shape, stride, dtype, device: of the parameter, when it was sharded.
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
        ranks: ShardGroup,
        may_gather: Callable[[ShardedParam], bool],
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
            raise AssertionError(f"parameter {self.name} does not exist any more, and its shard is used")
        return param

    @property
    def is_whole(self) -> bool:
        """Whether the parameter is whole here."""
        return self.param in _WHOLE

    @property
    def cuts(self) -> list[int]:
        """The boundaries of the ranks' ranges: one more than ranks."""
        size, numel = len(self.ranks.members), self.shape.numel()
        return [numel * rank // size for rank in range(size + 1)]

    @property
    def own(self) -> slice:
        """This rank's range."""
        low, high = self.cuts[self.ranks.messages.rank :][:2]
        return slice(low, high)

    # -- sharded and gathered ---------------------------------------------------------------------------------------

    @outside_modes
    def shard(self, *, source: int = 0, shared: bool = False) -> bool:
        """Keep this rank's range of the values of rank ``source``, and seal the parameter. Collective.

        Args:
            shared: whether to do it also where another tensor uses its memory on some rank.

        Returns:
            True if it did, or if there is nothing to shard, since the parameter does not exist any more on some rank.
        """
        param = self._param()
        with torch.no_grad():
            states = self.ranks.agree_on(f"shard {self._label}", _state_of(param, shared=shared))
            if param is None or _GONE in states:
                self.unmanage()
                return True
            if _IN_USE in states:
                return False
            if len(set(states)) > 1:
                found = ", ".join(f"rank {rank} has {each}" for rank, each in enumerate(states))
                raise self.ranks.mark_raised(
                    DisagreementError(f"{self._label} differs: {found}. Make the model alike on every rank.")
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

    def unmanage(self) -> None:
        """Forget the parameter, which is whole and stays an ordinary one."""
        param = self._param()
        if param is not None:
            _WHOLE.pop(param, None)

    @outside_modes
    def gather(self, *, keep: bool = False) -> None:
        """Make the parameter whole on every rank; ``keep`` this rank's elements beside it. Collective."""
        if self.elements is None:
            raise AssertionError(f"{self.name} has no elements to gather")
        self.ranks.agree_on(f"gather {self._label}")
        with torch.no_grad():
            full = torch.empty(self.shape.numel(), dtype=self.dtype, device=self.device)
            full[self.own].copy_(self.elements)
            self.ranks.messages.gather(full, self.cuts)
            if not keep:
                self.elements = None
            make_ordinary(self.param, full.as_strided(self.shape, self.stride))
            _WHOLE[self.param] = self

    @outside_modes
    def has_changed(self) -> bool:
        """Whether this rank's range of the parameter, which is whole, differs from the elements that were kept."""
        value = self.param.detach()
        if (value.shape, value.stride(), value.dtype) != (self.shape, self.stride, self.dtype) or self.elements is None:
            return True
        with torch.no_grad():  # by bytes: NaN is as good as another value
            return not torch.equal(flat(value)[self.own].view(torch.uint8), self.elements.view(torch.uint8))

    def seal(self) -> None:
        """Seal the parameter again, with the elements that were kept."""
        self._seal(torch.empty(0, dtype=self.dtype, device=self.device))

    def broadcast_ranges(self, comm: Comm, store: Callable[[int, Tensor], None]) -> None:
        """Call ``store(start, elements)`` with every rank's range, and keep nothing. Collective."""
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
    def _label(self) -> str:
        return f"parameter {self.index} ({self.name})"

    # -- parameter.Owner --------------------------------------------------------------------------------------------

    def on_sealed_access(self) -> bool:
        return self._may_gather(self)

    def on_data_read(self, index: int, alias: Tensor) -> None:
        raise AssertionError("a sharded parameter is sealed or an ordinary one, and never shown")

    def on_data_assigned(self, index: int, value: Tensor) -> None:
        raise AssertionError("a sharded parameter is sealed or an ordinary one, and never shown")

    def stride_of(self, index: int) -> tuple[int, ...]:
        return tuple(self.stride)

    def grad_of(self, index: int) -> Tensor | None:
        return None


def sharded_param_of(tensor: Tensor) -> ShardedParam | None:
    """The record of a parameter that is sharded without an engine; None for any other."""
    record = record_of(tensor)
    if record is None:
        found: ShardedParam | None = _WHOLE.get(tensor)
        return found
    return record.owner if isinstance(record.owner, ShardedParam) else None


_WHOLE = WeakTensorKeyDictionary()
"""The sharded parameters that are whole now."""


def check_sharded_params(params: Iterable[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Check that an engine over the ranks of ``group`` can use those of ``params`` that are sharded.

    Raises:
        UsageError: if one is whole now, or is sharded over other ranks.
        ModelError: for one whose values a failed ``initialize`` has lost.
    """
    members = () if group is None else tuple(dist.get_process_group_ranks(group))
    for param in params:
        sharded = sharded_param_of(param)
        if sharded is None:
            continue
        if sharded.is_whole:
            raise UsageError(
                "initialize was called inside sharded_weights() or gathered_parameters(), where parameters are whole. "
                "Call it after them."
            )
        if sharded.ranks.members != members:
            raise UsageError(
                f"the model was sharded over {ranks_text(sharded.ranks.members)}, and initialize shards over "
                f"{ranks_text(members or (0,))}. Give sharded_weights() and initialize() the same mesh=."
            )
        if sharded.elements is None:
            raise ModelError(
                f"parameter {sharded.name!r} lost its values in an initialize that failed. Make the model again."
            )


def _state_of(param: nn.Parameter | None, *, shared: bool) -> str:
    if param is None:
        return _GONE
    return f"{tuple(param.shape)} of {param.dtype}" if shared or owns_its_memory(param) else _IN_USE


_GONE, _IN_USE = "gone", "in use"


def _dense(value: Tensor) -> Tensor:
    """``value`` in memory that its elements fill."""
    ordered = sorted((stride, size) for stride, size in zip(value.stride(), value.shape, strict=True) if size != 1)
    expected = 1
    for stride, size in ordered:
        if stride != expected:
            return value.contiguous()
        expected *= size
    return value
