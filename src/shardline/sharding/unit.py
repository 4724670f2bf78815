"""One unit at run time: its flat buffers on this rank, and the state machine that gathers, releases and reduces them.

A :class:`Bucket` holds the buffers of one flat layout:

    weights     what rests on this rank: the whole bucket (placement R) or this rank's shard (S)
    gathered    the whole bucket while it is in use; ``weights`` itself where they rest whole
    master      what the optimizer updates, in fp32: a view of ``weights`` where these are fp32, else a buffer
    partial     gradients of this rank only, the whole bucket, while they wait for a reduction
    grad        reduced gradients from the first reduction of a window to its step, at least as long as ``master``

A :class:`Unit` moves its buckets together. In a world of one every transition is an alias: nothing is copied or sent.

``master`` and ``grad`` may live in host memory (:class:`HostMemory`): then a complete sum goes down and is added up
there, and a refresh brings masters up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import reduce
from operator import attrgetter
from weakref import ref

import torch
from torch import Tensor, nn

from shardline.comm import DONE, Comm, Work
from shardline.errors import ModelError, UsageError
from shardline.plan import BucketPlan, Entry, Fragment, Run, UnitPlan
from shardline.plan.placement import Placement, Stage, Transition, transition
from shardline.runtime.modes import outside_modes
from shardline.sharding.buffer import Pool, empty, has_memory_alone, view
from shardline.sharding.gradient import drop_grads, gradient_error, has_grads, take_grads
from shardline.sharding.host import HostMemory
from shardline.sharding.parameter import Record, assign, left_grad, let_go, seal, show
from shardline.sharding.precision import Precision
from shardline.sharding.rounding import Standstill

__all__ = ["Bucket", "Residence", "RunTensors", "Unit"]


class Residence(Enum):
    """Where a unit's whole weights are."""

    SHARDED = "sharded"  # not here: its parameters are sealed
    GATHERING = "gathering"  # on their way
    GATHERED = "gathered"  # here


@dataclass(frozen=True)
class RunTensors:
    """A run of this rank's masters: the optimizer's parameter, and the fragments that it consists of."""

    run: Run
    bucket: Bucket
    param: Tensor
    fragments: tuple[Fragment, ...]

    @property
    def low(self) -> int:
        """Where this rank's shard of the same bucket starts: a run of replicated states covers more than the shard."""
        return self.bucket.start

    @property
    def high(self) -> int:
        return self.bucket.stop


class Bucket:
    """The buffers of one bucket on this rank, and the owner of its parameters' data.

    Attributes:
        params: the model's own parameters, in order of the entries.
        generation: raised whenever the weights change other than by an edit, which a parameter's version tells; what
            was saved under an older one is stale.
        before: the masters before an edit, until training goes on: where a weight comes back, its master does.
        standing: the name of a frozen parameter that is edited again and again and stands still.
    """

    def __init__(
        self,
        plan: BucketPlan,
        params: Sequence[nn.Parameter],
        row: Stage,
        comm: Comm,
        pool: Pool,
        precision: Precision,
        offload: HostMemory | None = None,
        *,
        touched: Callable[[], bool] = lambda: False,
        converted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.plan, self.params, self.row = plan, list(params), row
        self.comm, self.pool, self.offload = comm, pool, offload
        self.local = comm.world_size == 1 and offload is None
        self.start, self.stop = plan.shard(comm.rank)
        self.reduce_dtype = plan.dtype if comm.world_size == 1 else precision.reduce_dtype(plan.dtype, row.gradients)
        self.grad_dtype = precision.grad_dtype(plan.dtype)
        self._loss_is_scaled = precision.compute is torch.float16
        self.master_dtype = precision.master_dtype(plan.dtype)
        self.masters_are_weights = self.master_dtype == plan.dtype and offload is None
        # A step holds whole gradients beside all else: to free them in between saves no peak and costs page faults.
        self._borrows_grad = row.states is Placement.REPLICATED and not self.local and offload is None
        self.weights: Tensor = torch.empty(0)
        self.gathered: Tensor | None = None
        self.master: Tensor | None = None
        self.partial: Tensor | None = None
        self.grad: Tensor | None = None
        self.generation = 0
        self.touched, self._may_convert = touched, converted
        self._records = {entry.param.name: Record(entry.param.name, i, self) for i, entry in enumerate(plan.entries)}
        self._versions: list[int] = []
        self._places = [  # in bytes; what is empty has no address
            entry.offset * plan.dtype.itemsize if entry.param.numel else None for entry in plan.entries
        ]
        self._handed: dict[int, list[ref[Tensor]]] = {}  # by index: what was read as .data and may be written to
        self._converted: set[int] = set()  # indices of those whose data is not a view for now
        self.before: Tensor | None = None
        self.standing: str | None = None
        self._standstill: dict[int, Standstill] = {}  # of frozen parameters in low precision that were edited

    # -- which part of the bucket a buffer in a given placement covers ------------------------------------------------

    def _range(self, placement: Placement) -> tuple[int, int]:
        return (self.start, self.stop) if placement is Placement.SHARDED else (0, self.plan.size)

    @property
    def state_range(self) -> tuple[int, int]:
        """The range of the bucket that ``master``, ``grad`` and the optimizer's state cover on this rank."""
        return self._range(self.row.states)

    def own(self, buffer: Tensor) -> Tensor:
        """This rank's shard of a buffer that covers the whole bucket, or of one that covers just the shard."""
        return buffer[self.start : self.stop] if buffer.numel() == self.plan.size else buffer

    # -- weights ----------------------------------------------------------------------------------------------------

    def allocate(self) -> None:
        """Make weights and masters, still without values but for the gaps, which are zero."""
        low, high = self._range(self.row.weights)
        self.weights = self._clear_gaps(empty(high - low, self.plan.dtype, self.comm.device), low)
        if self.plan.trainable:
            low, high = self.state_range
            if self.masters_are_weights:
                self.master = self.own(self.weights) if self.row.states is Placement.SHARDED else self.weights
            else:
                self.master = self._clear_gaps(self._empty_master(), low)

    def _clear_gaps(self, buffer: Tensor, low: int) -> Tensor:
        """``buffer``, which begins at element ``low`` of the bucket, with zeros where no parameter lies."""
        for start, stop in self.plan.gaps:
            buffer[max(start - low, 0) : max(stop - low, 0)].zero_()
        return buffer

    def store(self, entry: Entry, value: Tensor) -> None:
        """Take ``value``, the whole parameter of ``entry`` in any float dtype, into weights and masters."""
        if value.stride() != entry.param.stride:
            value = torch.empty_strided(entry.param.shape, entry.param.stride, dtype=value.dtype).copy_(value)
        elements = value.as_strided((entry.param.numel,), (1,), value.storage_offset())
        self._store(elements, entry, self.weights, self._range(self.row.weights))
        if self.master is not None and not self.masters_are_weights:
            self._store(elements, entry, self.master, self.state_range)

    @staticmethod
    def _store(elements: Tensor, entry: Entry, target: Tensor, covered: tuple[int, int]) -> None:
        low, high = max(entry.offset, covered[0]), min(entry.stop, covered[1])
        if low < high:
            target[low - covered[0] : high - covered[0]].copy_(elements[low - entry.offset : high - entry.offset])

    def load(self, source: int = 0) -> Work:
        """Start to take the values that rank ``source`` holds in the parameters themselves, in one broadcast.

        Collective. The parameters are not needed any more; their values are here when the work is done.
        """
        dtype = reduce(torch.promote_types, (param.dtype for param in self.params))
        in_place = dtype == self.plan.dtype and self.weights.numel() == self.plan.size
        whole = self.weights if in_place else self.pool.take(self.plan.size, dtype)
        if self.comm.rank == source:
            for start, stop in self.plan.gaps:
                whole[start:stop].zero_()
            for param, entry in zip(self.params, self.plan.entries, strict=True):
                view(whole, entry).copy_(param.detach())
        sent = self.comm.start_broadcast(whole, source)

        def arrive() -> None:
            sent.wait()
            if self.master is not None and not self.masters_are_weights:
                low, high = self.state_range
                self.master.copy_(whole[low:high])
            if not in_place:
                low, high = self._range(self.row.weights)
                self.weights.copy_(whole[low:high])
                self.pool.give(whole)

        work = Work((), arrive, arrived=sent.has_arrived)
        if work.has_arrived():  # a world of one: a buffer that is borrowed goes back at once
            work.wait()
        return work

    def show(self, whole: Tensor) -> None:
        """Make the parameters views of ``whole``."""
        for param, record, entry in zip(self.params, self._records.values(), self.plan.entries, strict=True):
            show(param, view(whole, entry), record)

    def seal(self) -> None:
        """Take the parameters' data away."""
        self._handed.clear()  # what was read of a gather that is over changes nothing
        for param, record in zip(self.params, self._records.values(), strict=True):
            seal(param, record, self.weights)

    def rest(self, entry: Entry, *, sealed: bool) -> None:
        """The same for one parameter, whose values are stored."""
        record = self._records[entry.param.name]
        if sealed:
            seal(self.params[record.index], record, self.weights)
        else:
            show(self.params[record.index], view(self.weights, entry), record)

    def take(self, whole: Tensor, changed: Collection[int] | None = None, *, keep: bool = False) -> None:
        """Take ``whole`` (in the dtype of the weights) over into this rank's weights at rest and masters.

        Args:
            changed: indices of the parameters that may have changed; all if left out.
            keep: whether masters come back if the weights do; see :meth:`adopt`.
        """
        self.comm.settle()
        spans = self._spans(changed)
        if self.weights.data_ptr() != whole.data_ptr():
            for start, stop in _within(spans, self._range(self.row.weights)):
                first = self._range(self.row.weights)[0]
                self.weights[start - first : stop - first].copy_(whole[start:stop])
        self._raise_masters(whole, spans, keep=keep)
        self._watch(whole)

    def _spans(self, changed: Collection[int] | None) -> list[tuple[int, int]]:
        """The ranges of the bucket in which parameters of these indices lie; neighbours make one."""
        if changed is None:
            return [(0, self.plan.size)]
        spans: list[tuple[int, int]] = []
        last = -2
        for index in sorted(changed):
            entry = self.plan.entries[index]
            start = spans.pop()[0] if index == last + 1 else entry.offset
            spans.append((start, entry.stop))
            last = index
        return spans

    def _raise_masters(self, whole: Tensor, spans: Sequence[tuple[int, int]], *, keep: bool) -> None:
        """Bring masters up to weights that somebody edited; where a weight is still its rounded master, that stays."""
        if self.master is None or self.masters_are_weights:
            return
        low = self.state_range[0]
        for start, stop in _within(spans, self.state_range):
            part = whole[start:stop].to(self.master.device)
            master = self.master[start - low : stop - low]
            same = master.to(part.dtype) == part
            if keep and self.before is None and not bool(same.all()):
                self.before = self.master.clone()
            raised = torch.where(same, master, part.to(self.master_dtype))
            if self.before is not None:
                before = self.before[start - low : stop - low]
                raised = torch.where(before.to(part.dtype) == part, before, raised)
            master.copy_(raised)

    def refresh(self, unit: int) -> None:
        """Bring this rank's updated masters into the weights at rest."""
        self.before = None
        if self.master is not None and not self.masters_are_weights:
            self.comm.settle()
            low, _ = self._range(self.row.weights)
            first, last = self.state_range
            target = self.weights[first - low : last - low]
            if self.offload is None:
                target.copy_(self.master)
            else:
                self.offload.up(unit, self.master, target)

    def note_versions(self) -> None:
        """Remember the parameters as they are now, so that later edits are noticed."""
        self._versions = [*map(_VERSION, self.params)]

    def edited(self) -> list[int]:
        """Indices of the parameters that were edited in place since :meth:`note_versions`."""
        versions = [*map(_VERSION, self.params)]
        if versions == self._versions:
            return []
        return [i for i, (now, before) in enumerate(zip(versions, self._versions, strict=True)) if now != before]

    def changed(self) -> set[int]:
        """Indices of the parameters that may have changed: edited, or handed out as ``.data``, which has no version."""
        return {*self.edited(), *self._handed}

    def edited_names(self) -> list[str]:
        """Names of the parameters that were changed since they were last shown."""
        found = set(self.edited())
        if self.gathered is not None and self.gathered.data_ptr() != self.weights.data_ptr():
            low = self._range(self.row.weights)[0]
            for index in self._handed:
                for start, stop in _within(self._spans([index]), self._range(self.row.weights)):
                    if not torch.equal(self.gathered[start:stop], self.weights[start - low : stop - low]):
                        found.add(index)
        return [self.plan.entries[index].param.name for index in sorted(found)]

    def _watch(self, whole: Tensor) -> None:
        """Notice edits of frozen weights that rounding loses. Trained ones have masters for that."""
        if self.plan.trainable or not self.plan.dtype.is_floating_point or self.plan.dtype.itemsize > 2:
            return
        edited = set(self.edited())
        for index in edited | set(self._handed):
            entry = self.plan.entries[index]
            watch = self._standstill.setdefault(index, Standstill())
            if watch.edited(whole[entry.offset : entry.stop], certain=index in edited):
                self.standing = entry.param.name

    # -- what users do to parameters; see parameter.Owner ------------------------------------------------------------

    def handed_out(self, index: int, alias: Tensor) -> None:
        known = self._handed.get(index, ())
        self._handed[index] = [*(each for each in known if each() is not None), ref(alias)]

    def _forget_dead(self) -> None:
        """What was handed out and let go can change nothing any more."""
        alive = ((index, [each for each in refs if each() is not None]) for index, refs in self._handed.items())
        self._handed = {index: refs for index, refs in alive if refs}

    @outside_modes
    @outside_modes
    def assigned(self, index: int, value: Tensor) -> None:
        """``param.data = value``: copied in; or, in another dtype, in its place until the forward or backward ends.

        Raises:
            ModelError: for a value of another shape, device or memory format, or of another dtype at any other time.
        """
        param, place = self.params[index], self._place(index)
        if value.shape == place.shape and value.device == place.device and not _is_reformatted(value, place):
            if value.dtype == place.dtype:
                self._copy_in(index, value, place)
                return
            if value.is_floating_point() and place.is_floating_point() and self._may_convert():
                assign(param, value.detach())
                self._converted.add(index)
                return
        raise replaced_error(self.plan.entries[index].param.name, value)

    def _place(self, index: int) -> Tensor:
        if self.gathered is None:
            raise AssertionError(f"{self.plan.entries[index].param.name} is shown, and its weights are not here")
        return view(self.gathered, self.plan.entries[index])

    def _copy_in(self, index: int, value: Tensor, place: Tensor) -> None:
        with torch.no_grad():
            place.copy_(value)
        self._handed.setdefault(index, [])
        if index in self._converted:
            self._converted.remove(index)
            assign(self.params[index], place)

    def take_back(self) -> None:
        """Make parameters that a forward converted views again; what it changed of their values is taken over."""
        for index in list(self._converted):
            place = self._place(index)
            with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
                value = self.params[index].detach()
                self._copy_in(index, torch.where(place.to(value.dtype) == value, place, value.to(place.dtype)), place)

    def check_in_place(self) -> None:
        """See that every parameter shown is the one the engine knows, and a view of ``gathered``.

        Raises:
            ModelError: if a parameter or its tensor was replaced instead of edited.
        """
        whole = self.gathered
        if whole is None:
            return
        base, size = whole.data_ptr(), whole.element_size()
        addresses = [0 if place is None else base + place for place in self._places]
        if [*map(_ADDRESS, self.params)] == addresses and not self.edited():
            return  # whatever changes a shape raises the version
        for param, entry in zip(self.params, self.plan.entries, strict=True):
            moved = param.data_ptr() != base + entry.offset * size and entry.param.numel
            shaped = param.shape == entry.param.shape and param.stride() == entry.param.stride
            if moved or not shaped or param.dtype != self.plan.dtype:
                raise replaced_error(entry.param.name, param)

    def adopt(self, *, keep: bool = False) -> None:
        """Take edits of resting weights (``clamp_``, ``load_state_dict``, ``.data``) over into the masters.

        Args:
            keep: whether the masters of now come back if, until the next update, the weights do.

        Raises:
            ModelError: if a parameter's tensor was replaced instead of edited.
        """
        self.check_in_place()
        changed = self.changed()
        if changed:
            self._raise_masters(self.weights, self._spans(changed), keep=keep)
            self._watch(self.weights)
            self.note_versions()
            self._forget_dead()

    # -- gradients --------------------------------------------------------------------------------------------------

    def fold(self, factor: float) -> None:
        """Move the parameters' ``.grad`` into ``partial`` (a local bucket: ``grad``), times ``factor``."""
        if self.local:
            fresh = self.grad is None
            if fresh and self._take_only_grad(factor):
                return
            if self.grad is None:
                self.grad = self._empty_grad()
            self._pack(self.grad, factor, add=not fresh)
            return
        fresh = self.partial is None
        if self.partial is None:
            self.partial = self.pool.take(self.plan.size, self.grad_dtype, lasting=True)
        self._pack(self.partial, factor, add=not fresh)

    def _take_only_grad(self, factor: float) -> bool:
        """Where the bucket is one parameter whose gradient lies as it does, that very tensor can be ``grad``: no copy.

        Unless autograd gave the same memory to another parameter (views of one sum): it would be scaled twice.
        """
        param, entry = self.params[0], self.plan.entries[0]
        with torch._C.DisableTorchFunctionSubclass():
            found = left_grad(param)
        if found is None or found.layout is not torch.strided or found.dtype != self.grad_dtype:
            return False
        if found.numel() != self.plan.size or found.stride() != entry.param.stride or not has_memory_alone(found):
            return False
        drop_grads(self.params)
        self.grad = found.as_strided((self.plan.size,), (1,))
        if factor != 1.0:
            self.grad.mul_(factor)
        return True

    def reduce(self, unit: int, factor: float) -> Work:
        """Start to sum the gradients of all ranks into this rank's range of ``grad``."""
        if self.local:
            self.fold(factor)
            return DONE
        if self.offload is not None:
            return self._reduce_down(self.offload, unit, *self._source(factor))
        add = self.grad is not None
        grad = self._empty_grad() if self.grad is None else self.grad
        source, borrowed = self._source(factor, None if add else grad)
        self.grad, out = grad, self.own(grad)
        work = self.comm.reduce(unit, source, self.plan.boundaries, out, add=add, scratch=self.pool)

        def finish() -> None:
            work.wait()
            self._give(borrowed)

        return Work((), finish, arrived=work.has_arrived)

    def _reduce_down(self, offload: HostMemory, unit: int, source: Tensor, borrowed: list[Tensor]) -> Work:
        """The same where ``grad`` is in host memory: the sum goes there when it is complete."""
        if self.comm.world_size == 1:
            total, work, borrowed = source, DONE, [each for each in borrowed if each is not source]
        else:
            total = self.pool.take(self.stop - self.start, self.grad_dtype)
            work = self.comm.reduce(unit, source, self.plan.boundaries, total, add=False, scratch=self.pool)

        def arrived(host: Tensor) -> None:
            self.pool.give(total)
            if self.grad is None:
                self.grad = host.to(self.grad_dtype)
            else:
                self.grad.add_(host)

        def finish() -> None:
            work.wait()
            self._give(borrowed)
            offload.down(unit, total, arrived)

        return Work((), finish, arrived=work.has_arrived)

    def _give(self, borrowed: list[Tensor]) -> None:
        while borrowed:
            self.pool.give(borrowed.pop())

    def _source(self, factor: float, place: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """This rank's gradients as they travel, and the buffers of the pool in which they lie.

        They may be packed into ``place``, where their sum will be, if that is as large as the bucket.
        """
        if self.partial is None:
            if place is not None and place.numel() == self.plan.size and place.dtype == self.reduce_dtype:
                self._pack(place, factor, add=False)
                return place, []
            wire = self.pool.take(self.plan.size, self.reduce_dtype)
            self._pack(wire, factor, add=False)
            return wire, [wire]
        self.fold(factor)
        partial, self.partial = self.partial, None
        if partial.dtype == self.reduce_dtype or self.comm.world_size == 1:
            return partial, [partial]
        wire = self.pool.take(self.plan.size, self.reduce_dtype)
        wire.copy_(partial)
        return wire, [wire, partial]

    def _empty_master(self) -> Tensor:
        low, high = self.state_range
        if self.offload is not None:
            return self.offload.empty(high - low, self.master_dtype)
        return empty(high - low, self.master_dtype, self.comm.device)

    def _empty_grad(self) -> Tensor:
        low, high = self.state_range
        if self._borrows_grad:
            return self.pool.take(high - low, self.grad_dtype, lasting=True)
        # Not from the pool: a shard lives until the step, and between steps its memory serves activations.
        return torch.empty(high - low, dtype=self.grad_dtype, device=self.comm.device)

    def share_grad(self, unit: int) -> Work:
        """Where states rest whole, bring the reduced gradients of all shards here."""
        if self.grad is None or self.row.states is not Placement.REPLICATED:
            return DONE
        return self.comm.gather(unit, self.grad, self.plan.boundaries)

    def drop_grad(self) -> None:
        """Forget what was accumulated in this window."""
        if self.grad is not None and self._borrows_grad:
            self.pool.give(self.grad)
        if self.partial is not None:
            self.pool.give(self.partial)
        self.partial = self.grad = None
        drop_grads(self.params)

    def has_grad(self) -> bool:
        return has_grads(self.params)

    def grad_of(self, index: int) -> Tensor | None:
        """What ``.grad`` of a parameter is since its gradient was collected: None where nothing was.

        Raises:
            UsageError: where it is not whole, or has a loss scale.
        """
        entry = self.plan.entries[index]
        whole = self.whole_grad(f"parameter {entry.param.name!r}", ".grad")
        return None if whole is None else view(whole, entry)

    def whole_grad(self, name: str, operation: str) -> Tensor | None:
        """The bucket's gradients, to be seen and changed; None where none was collected. Raises as :meth:`grad_of`.

        ``name`` and ``operation`` are for the error.
        """
        if self.grad is None and self.partial is None:
            return None
        if not self.local or self._loss_is_scaled:
            raise gradient_error(name, operation)
        return self.grad

    def _pack(self, target: Tensor, factor: float, *, add: bool) -> None:
        """Copy or add the parameters' gradients to their places in ``target``, and let go of them."""
        grads, places, missing = [], [], []
        for grad, entry in zip(take_grads(self.params), self.plan.entries, strict=True):
            if grad is None:
                missing.append(target[entry.offset : entry.stop])
            else:
                grads.append(grad.to_dense() if grad.layout is not torch.strided else grad)
                places.append(view(target, entry))
        # What is scaled is the target: two gradients may be views of the same memory.
        if add:
            if grads:
                torch._foreach_add_(places, grads, alpha=factor)
            return
        if grads:
            torch._foreach_copy_(places, grads)
            if factor != 1.0:
                torch._foreach_mul_(places, factor)
        missing += [target[start:stop] for start, stop in self.plan.gaps]
        if missing:
            torch._foreach_zero_(missing)

    # -- what the optimizer sees ------------------------------------------------------------------------------------

    def runs(self) -> Iterator[RunTensors]:
        """This rank's runs, each with its range of ``master``."""
        if self.master is None:
            return
        low, high = self.state_range
        for run in self.plan.runs(low, high):
            fragments = tuple(self.plan.fragments(run.start, run.stop))
            yield RunTensors(run, self, _cut(self.master, run, low), fragments)

    def run_grad(self, run: Run) -> Tensor | None:
        """The gradients of ``run``, in the dtype of the masters; a view where that is theirs."""
        if self.grad is None:
            return None
        whole = self.grad.numel() == self.plan.size
        return _cut(self.grad, run, 0 if whole else self.start).to(self.master_dtype)


def _cut(buffer: Tensor, run: Run, low: int) -> Tensor:
    """The range of ``run`` in ``buffer``, which begins at element ``low`` of its bucket, as the optimizer sees it."""
    if run.entry is None:
        return buffer[run.start - low : run.stop - low]
    param = run.entry.param
    return buffer.as_strided(param.shape, param.stride, buffer.storage_offset() + run.start - low)


_VERSION: Callable[[Tensor], int] = attrgetter("_version")
_ADDRESS: Callable[[Tensor], int] = Tensor.data_ptr


def _within(spans: Sequence[tuple[int, int]], covered: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The parts of ``spans`` that lie in ``covered``."""
    for start, stop in spans:
        start, stop = max(start, covered[0]), min(stop, covered[1])
        if start < stop:
            yield start, stop


def _is_reformatted(value: Tensor, place: Tensor) -> bool:
    """Whether ``value`` is the same in another memory format, which the buffer cannot show."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(value.dim())
    return wanted is not None and any(
        value.is_contiguous(memory_format=each) and not place.is_contiguous(memory_format=each)
        for each in (wanted, torch.contiguous_format)
    )


def replaced_error(name: str, found: Tensor) -> ModelError:
    return ModelError(
        f"parameter {name!r} was replaced after initialize: the model now holds a tensor of {tuple(found.shape)} "
        f"{found.dtype} with strides {found.stride()} outside the engine's buffers. Edit weights in place (copy_, "
        f"load_state_dict); convert dtype or memory format (.half(), .to(memory_format=...)) before "
        f"shardline.initialize."
    )


class Unit:
    """Parameters that are gathered, used, released and reduced together.

    Attributes:
        sharded: whether the weights rest sharded, so that a use needs a gather.
        local: whether reductions are aliases: a world of one whose states are beside its weights.
        state_device: where masters, reduced gradients and optimizer state are.
        residence: where the whole weights are now.
        holds: uses in progress; a unit in use is not released.
        pinned: a graph may hold the parameters themselves: they stay, whole, until the weights change.
        on_convert: whether a parameter may be converted now, and who then calls :meth:`take_back`.
    """

    def __init__(
        self,
        plan: UnitPlan,
        params: dict[str, nn.Parameter],
        row: Stage,
        comm: Comm,
        pool: Pool,
        precision: Precision,
        on_touch: Callable[[Unit], bool],
        offload: HostMemory | None = None,
    ) -> None:
        self.plan, self.row, self.comm, self.pool, self.offload = plan, row, comm, pool, offload
        self.state_device = comm.device if offload is None else offload.device
        self.index, self.name = plan.index, plan.name
        self.buckets = [
            Bucket(
                bucket,
                [params[entry.param.name] for entry in bucket.entries],
                row,
                comm,
                pool,
                precision,
                offload,
                touched=lambda: on_touch(self),
                converted=lambda: self.on_convert(self),
            )
            for bucket in plan.buckets
        ]
        self.local = all(bucket.local for bucket in self.buckets)
        self.trainable = [bucket for bucket in self.buckets if bucket.plan.trainable]
        self.sharded = transition(row.weights, Placement.REPLICATED) is Transition.GATHER and comm.world_size > 1
        self.residence = Residence.SHARDED if self.sharded else Residence.GATHERED
        self.holds = 0
        self.pinned = False
        self.on_convert: Callable[[Unit], bool] = lambda unit: False
        self._works: list[Work] = []
        self._reductions: list[Work] = []

    # -- weights ----------------------------------------------------------------------------------------------------

    def allocate(self) -> None:
        """Make the buffers that rest on this rank; :meth:`Bucket.store` fills them, :meth:`settle` ends that."""
        for bucket in self.buckets:
            bucket.allocate()
            bucket.gathered = None if self.sharded else bucket.weights

    def rest(self, bucket: Bucket, entry: Entry) -> None:
        """Bring one parameter, whose values are stored, into the state in which it rests."""
        bucket.rest(entry, sealed=self.sharded)

    def settle(self) -> None:
        """Bring the parameters into the state in which they rest: views of whole weights, or sealed."""
        self.renew()
        if self.sharded:
            self._seal()
            self._give_back()
            return
        for bucket in self.buckets:
            bucket.show(bucket.weights)
            bucket.note_versions()

    def renew(self) -> None:
        """The weights are others than before."""
        for bucket in self.buckets:
            bucket.generation += 1

    def gather(self) -> None:
        """Start to bring the whole weights here."""
        if self.residence is not Residence.SHARDED:
            return
        for bucket in self.buckets:
            whole = self.pool.take(bucket.plan.size, bucket.plan.dtype)
            bucket.gathered = whole
            self._works.append(self.comm.gather(self.index, whole, bucket.plan.boundaries, own=bucket.weights))
        self.residence = Residence.GATHERING

    def join(self) -> None:
        """Take part in a gather for ranks that need it, and let go of what comes. What is here stays as it is."""
        for bucket in self.buckets:
            whole = self.pool.take(bucket.plan.size, bucket.plan.dtype)
            self.comm.gather(self.index, whole, bucket.plan.boundaries, own=bucket.weights).wait()
            self.pool.give(whole)

    def wait(self) -> None:
        """Return when the whole weights are here and the parameters show them."""
        self.gather()
        if self.residence is Residence.GATHERED:
            return
        while self._works:
            self._works.pop().wait()
        for bucket in self.buckets:
            if bucket.gathered is not None:
                self.pool.label(bucket.gathered, (self, bucket))
                bucket.show(bucket.gathered)
                bucket.note_versions()
        self.residence = Residence.GATHERED

    def release(self) -> None:
        """Let the whole weights go, unless they rest whole or are in use. In-place edits of them are kept."""
        if not self.sharded or self.holds or self.pinned or self.residence is Residence.SHARDED:
            return
        if self.residence is Residence.GATHERED:
            self._keep_edits()
        while self._works:
            self._works.pop().wait()
        self._seal()
        self._give_back()

    def hide(self) -> None:
        """Seal the parameters although their whole weights stay, for a use that comes soon: it needs no gather."""
        if self.sharded and not self.holds and not self.pinned and self.residence is Residence.GATHERED:
            self._keep_edits()
            self._seal()
            self.residence = Residence.GATHERING

    def edited(self) -> list[str]:
        """Names of the parameters that were changed since they were last shown."""
        return [name for bucket in self.buckets for name in bucket.edited_names()]

    def take_back(self) -> None:
        """Make parameters that a forward or backward converted views again."""
        for bucket in self.buckets:
            bucket.take_back()

    def _keep_edits(self) -> None:
        for bucket in self.buckets:
            bucket.take_back()
            changed = bucket.changed()
            if bucket.gathered is not None and changed:
                bucket.take(bucket.gathered, changed)

    def _seal(self) -> None:
        for bucket in self.buckets:
            bucket.seal()

    def _give_back(self) -> None:
        for bucket in self.buckets:
            if bucket.gathered is not None:
                self.pool.give(bucket.gathered)
                bucket.gathered = None
        self.residence, self.pinned = Residence.SHARDED, False

    def write_back(self) -> None:
        """Take edits of the gathered weights over into shards and masters: rank 0's values win on every rank."""
        if self.residence is not Residence.GATHERED:
            raise AssertionError(f"unit {self.name} is {self.residence.value}, so there is nothing to write back")
        changed = []
        for bucket in self.buckets:
            whole = bucket.gathered
            if whole is None:
                raise AssertionError(f"unit {self.name} shows no weights")
            bucket.check_in_place()
            self.comm.broadcast([whole])
            changed.append(not torch.equal(bucket.own(whole), bucket.own(bucket.weights)))
            bucket.take(whole, keep=True)
            bucket.note_versions()
        # What autograd saved before is stale on all ranks if one shard changed, and on none if nothing did.
        for bucket, found in zip(self.buckets, zip(*self.comm.exchange(changed), strict=True), strict=True):
            bucket.generation += any(found)

    def refresh(self) -> list[Work]:
        """After an update: bring the masters into the weights, and start the gather where these rest whole.

        A gathered copy of sharded weights is now of an older generation and is let go.
        """
        if self.holds:
            raise UsageError(
                f"step() was called while unit {self.name!r} is in use. Call it outside of forward and of "
                f"gathered_parameters()."
            )
        if not self.trainable:
            return []
        works = []
        for bucket in self.trainable:
            bucket.refresh(self.index)
            if transition(self.row.states, self.row.weights) is Transition.GATHER:
                works.append(self.comm.gather(self.index, bucket.weights, bucket.plan.boundaries))
            bucket.generation += 1
        self.release()
        return works

    def check_in_place(self) -> None:
        """See that nobody replaced a parameter's tensor while it is shown; see :meth:`Bucket.check_in_place`."""
        if self.residence is Residence.GATHERED:
            for bucket in self.buckets:
                bucket.check_in_place()

    def adopt(self, *, keep: bool = True) -> None:
        """Notice edits that were made to resting weights; see :meth:`Bucket.adopt`."""
        if not self.sharded:
            for bucket in self.buckets:
                bucket.adopt(keep=keep)

    def forget_before(self) -> None:
        """Training goes on from the weights as they are now: no earlier masters will be asked for."""
        for bucket in self.buckets:
            if bucket.before is not None:
                if not self.sharded:
                    bucket.adopt()
                bucket.before = None

    def settle_versions(self) -> None:
        """The weights as they are now are nobody's edits."""
        for bucket in self.buckets:
            bucket.note_versions()

    def let_go(self) -> None:
        """Give the parameters tensors of their own; the unit is not used any more."""
        self.wait()
        for bucket in self.buckets:
            if bucket.gathered is not None:
                for param, entry in zip(bucket.params, bucket.plan.entries, strict=True):
                    let_go(param, view(bucket.gathered, entry).clone())
                drop_grads(bucket.params)
            bucket.gathered = bucket.master = bucket.grad = bucket.partial = None
            bucket.weights = torch.empty(0)
            bucket.params.clear()  # what they know of the bucket, and it of them, is a cycle

    # -- gradients --------------------------------------------------------------------------------------------------

    def has_grad(self) -> bool:
        """Whether any parameter has a ``.grad`` that was not collected yet."""
        return any(bucket.has_grad() for bucket in self.trainable)

    def has_partial(self) -> bool:
        """Whether gradients of this rank wait for a reduction."""
        return any(bucket.partial is not None for bucket in self.trainable)

    def fold(self, factor: float) -> None:
        """Collect this rank's gradients without talking to the others."""
        for bucket in self.trainable:
            bucket.fold(factor)

    def reduce(self, factor: float) -> None:
        """Collect this rank's gradients and start to sum them over the ranks. Absent ones count as zero."""
        for bucket in self.trainable:
            self._reductions.append(bucket.reduce(self.index, factor))

    def has_reduced(self) -> bool:
        """Whether :meth:`finish_reduce` would wait for no other rank."""
        return all(work.has_arrived() for work in self._reductions)

    def finish_reduce(self) -> None:
        """Return when every started reduction of this unit is complete, and in ``grad`` or on its way down to it."""
        while self._reductions:
            self._reductions.pop(0).wait()

    def arrive(self) -> None:
        """Return when gradients that are on their way down to host memory are in ``grad``."""
        if self.offload is not None:
            self.offload.arrive()

    def share_grads(self) -> list[Work]:
        return [bucket.share_grad(self.index) for bucket in self.trainable]

    def drop_grads(self) -> None:
        """Forget all gradients of this window, those in flight included."""
        self.finish_reduce()
        self.arrive()
        for bucket in self.buckets:
            bucket.drop_grad()
