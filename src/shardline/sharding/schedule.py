"""When units are gathered, released and reduced.

A rank runs passes: forwards with and without gradients, and backwards. The first forward of a kind and each backward of
the first step are negotiated with the other ranks, gather by gather. If all ranks did the same, that is the order which
later passes follow without any message (:mod:`shardline.sharding.passes`). After a step in which ranks differed, the
next step is negotiated.

* **gathers** are issued in the order of their uses.
* **reductions** are issued in the order in which units get ready, once that was the same on all ranks; in a negotiated
  backward, in the reverse of the forward. A unit that is ready early waits for its turn. An unused unit reduces zeros.

=================  =====================================================================================
class              holds
=================  =====================================================================================
Schedule           the pass that runs, and the uses of units
Pass               what is due in it (:mod:`~shardline.sharding.passes`)
Readiness          when the gradients of a unit are complete (:mod:`~shardline.sharding.readiness`)
ReduceQueue        what is in flight (:mod:`~shardline.sharding.reduce_queue`)
Agreement          which orders ranks share (:mod:`~shardline.sharding.agreement`)
=================  =====================================================================================

Methods that hooks call are named by the moment: ``pre_forward``, ``post_forward``, ``pre_backward``, ``post_backward``.

No lock is needed: on an accelerator autograd runs the hooks of a backward on a thread of its own, but one after
another, and the thread that called backward waits meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial

from shardline.sharding.agreement import Agreement, Kind, PassRecord, Signature
from shardline.sharding.negotiation import Negotiation
from shardline.sharding.passes import Followed, Issue, Negotiated, Pass
from shardline.sharding.readiness import Readiness
from shardline.sharding.reduce_queue import ReduceQueue
from shardline.sharding.unit import Residence, Unit

__all__ = ["Schedule"]


class _Uses:
    """Units that the forwards since the last backward used.

    Attributes:
        in_order: each once, by its first use with gradients.
        differentiable: those with an input that requires a gradient.
        forwards: how many there were, with gradients.
        into_inputs: whether an input of the model, or of a module called without it, requires a gradient.
        last: the unit used last in the current forward, or in the last one.
    """

    def __init__(self) -> None:
        self.last: int | None = None
        self._with_grad = True
        self.forget()

    def forget(self) -> None:
        """A backward is over."""
        self.in_order: dict[int, None] = {}
        self.differentiable: set[int] = set()
        self.forwards, self.into_inputs = 0, False

    def begin_forward(self, *, with_grad: bool) -> None:
        self.last, self._with_grad = None, with_grad

    def add(self, unit: Unit) -> None:
        self.last = unit.index
        if self._with_grad:
            self.in_order[unit.index] = None

    def signature(self, kind: Kind) -> Signature:
        """The signature of a backward that begins now."""
        return Signature(kind, self.forwards, self.into_inputs)


class Schedule:
    """Drives the units of one engine. Module hooks call it as the model runs, and the engine's methods.

    Args:
        units: all of the engine's.
        all_gather_ints: exchanges a row of integers with every rank; see :meth:`Comm.all_gather_ints`.
        prefetch: whether gathers begin one use ahead.
        reshard_after_forward: whether weights are released between forward and backward.
        max_live: how many elements of weights to keep that were gathered for other ranks.
        on_host: whether waiting for a reduction blocks the host.

    Attributes:
        in_backward: whether a backward of the engine runs.
        reducing: whether this backward's gradients are reduced, or only added up on this rank, as in a single process.
        factor: what gradients are multiplied by when they are collected.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        all_gather_ints: Callable[[Sequence[int]], list[list[int]]],
        *,
        prefetch: bool,
        reshard_after_forward: bool,
        max_live: int,
        on_host: bool,
    ) -> None:
        self.units = units
        self.in_backward = False
        self.reducing = True
        self.factor = 1.0
        self._negotiation = Negotiation(units, all_gather_ints)
        self._agreement = Agreement(units, self._negotiation, prefetch=prefetch)
        self._readiness = Readiness(units)
        self._queue = ReduceQueue(units, on_host=on_host)
        self._follow = partial(Followed, prefetch=prefetch, max_live=max_live, ready=self._readiness.is_ready)
        self._reshard_after_forward = reshard_after_forward
        self._sharded = [unit.index for unit in units if unit.sharded]
        self._forward: Pass | None = None
        self._backward = Pass()
        self._running = Signature(Kind.FORWARD), 0  # the pass, and its number among those of its signature in the step
        self._carried_over: set[int] = set()  # units that are gathered between two passes, on every rank
        self._uses = _Uses()
        self._calls = 0  # module calls in progress, without gathered_parameters(), in which ranks may differ
        self._converted: list[Unit] = []
        for unit in units:
            unit.on_convert = self._convert

    # -- forward ----------------------------------------------------------------------------------------------------

    def begin_forward(self, *, with_grad: bool) -> None:
        """The model's own forward begins."""
        if self.in_backward or self._forward is not None:
            return
        self._release_but(self._carried_over)
        if not self._reshard_after_forward:
            kept = frozenset(self._sharded)
        else:  # a backward begins with the unit used last: releasing it would only gather it again
            kept = self._agreement.last if with_grad else frozenset()
        if all(self.units[index].holds for index in self._sharded):
            self._forward = Pass(kept)
        else:
            self._forward = self._start(Signature(Kind.FORWARD if with_grad else Kind.EVALUATION), kept)
            self._uses.forwards += with_grad
        self._uses.begin_forward(with_grad=with_grad)

    def end_forward(self) -> None:
        """The model's own forward is over, with or without an error."""
        if self.in_backward or self._forward is None:
            return
        current, self._forward = self._forward, None
        try:
            for issue in current.finish():
                issue()
            self._conclude(current)
        finally:
            self._end_conversions()
            kept = self._agreement.last & set(current.kept) if self._reshard_after_forward else current.kept
            self._carried_over = {index for index in kept if self.units[index].residence is not Residence.SHARDED}
            self._release_but(self._carried_over)
            if self._reshard_after_forward:
                for index in self._carried_over:
                    self.units[index].seal_keeping_buffer()

    def pre_forward(self, unit: Unit) -> None:
        """A module that uses ``unit`` begins its forward, outside of backward. :meth:`post_forward` follows."""
        outermost = not unit.holds
        unit.hold()
        self._calls += 1
        self._readiness.use_in_forward(unit)
        if outermost:
            for issue in self._use(unit):
                issue()

    def post_forward(self, unit: Unit) -> None:
        """The forward that began with :meth:`pre_forward` is over."""
        unit.unhold()
        self._calls -= 1
        if self._converted and not self._is_running():
            self._end_conversions()
        if not unit.sharded or unit.holds or self.in_backward:
            return
        if self._forward is not None:
            self._forward.reshard(unit)
        else:
            self._carried_over.discard(unit.index)
            unit.reshard()

    def on_sealed_access(self, unit: Unit) -> bool:
        """A sealed parameter of ``unit`` is used outside of its module. Gathers it where the model runs, since then all
        ranks can be doing the same; returns whether it did."""
        if not self._is_running():
            return False
        if self.in_backward:
            self.pre_backward(unit)
        else:
            for issue in self._use(unit):
                issue()
        return True

    def _is_running(self) -> bool:
        """Whether the model, or a module of it, runs."""
        return self.in_backward or self._forward is not None or self._calls > 0

    def _use(self, unit: Unit) -> Iterable[Issue]:
        """What a use of ``unit`` by the model makes due."""
        if self._forward is not None:
            self._uses.add(unit)
        return self._unshard(unit, again=True)

    def _unshard(self, unit: Unit, *, again: bool = False) -> Iterable[Issue]:
        """The collectives that are due before ``unit`` can be used (:meth:`Pass.unshard`). Outside of the model's own
        forward and backward there is no pass, so ranks negotiate each gather."""
        if not unit.sharded:
            return ()
        current = self._backward if self.in_backward else self._forward
        if current is not None:
            return current.unshard(unit, again=again)
        if unit.residence is not Residence.SHARDED:
            unit.wait_for_unshard()
        elif self._negotiation.request(unit):
            self._carried_over.add(unit.index)
        else:
            self._agreement.differ()
        return ()

    def _convert(self, unit: Unit) -> bool:
        """A parameter of ``unit`` is about to be converted. Returns whether that is allowed: while the model runs.

        At the end of that run :meth:`_end_conversions` makes it a view again.
        """
        if self._is_running():
            self._converted.append(unit)
            return True
        return False

    def _end_conversions(self) -> None:
        while self._converted:
            self._converted.pop().restore_views()

    def release_all(self) -> None:
        """Release every unit that is not in use."""
        self._release_but(())

    def _release_but(self, kept: Collection[int]) -> None:
        for index in self._sharded:
            if index not in kept:
                self.units[index].reshard()

    # -- passes -----------------------------------------------------------------------------------------------------

    def _start(self, signature: Signature, kept: Collection[int] = ()) -> Pass:
        """A pass, by its order if there is one."""
        order = self._agreement.order(signature)
        self._running = signature, self._agreement.begin(signature)
        queue = self._queue if signature.kind is Kind.BACKWARD else None
        if order is None:
            ready, reduce_order = self._readiness.is_ready, self._agreement.reduce_order
            return Negotiated(self._negotiation, self.units, kept, queue, reduce_order, ready, self.factor)
        carried_over = [index for index in self._sharded if self.units[index].residence is not Residence.SHARDED]
        kept = order.kept | frozenset(kept)
        return self._follow(order, self.units, kept, carried_over=carried_over, queue=queue, factor=self.factor)

    def _conclude(self, current: Pass) -> None:
        """Every collective of a pass was issued. If it was negotiated, compare what the ranks did. Collective then."""
        self._agreement.left_order = self._agreement.left_order or current.left_order
        if isinstance(current, Negotiated):
            uses = self._uses
            self._agreement.conclude(
                PassRecord(
                    *self._running,
                    events=tuple(current.events),
                    kept=frozenset(current.kept),
                    uses=tuple(uses.in_order),
                    no_input_grads=frozenset(uses.in_order.keys() - uses.differentiable),
                    last=uses.last,
                    reductions=current.issued,
                )
            )

    def end_step(self) -> bool:
        """A step ends, on all ranks alike. Returns whether this rank left an agreed order in it."""
        return self._agreement.end_step()

    @property
    def wrong_hints(self) -> set[int]:
        """Units whose gradients came after their hint."""
        return self._readiness.wrong_hints

    def negotiate_next(self, wrong_hints: Iterable[int] = (), *, ending: bool = False) -> None:
        """All ranks have learned that one left an agreed order or had late gradients: negotiate the next step.

        Args:
            wrong_hints: units of which any rank had late gradients.
            ending: whether :meth:`end_step` follows at once, so that the next step is the one after it.
        """
        self._readiness.wrong_hints.update(wrong_hints)
        self._agreement.negotiate_next(ending=ending)

    # -- backward ---------------------------------------------------------------------------------------------------

    def begin_backward(self, *, reducing: bool, factor: float) -> None:
        """A backward begins whose gradients are multiplied by ``factor`` and, if ``reducing``, reduced as they come."""
        self.in_backward, self.factor = True, factor
        self.reducing = reducing and not all(unit.is_local for unit in self.units)
        self._readiness.begin()
        self._queue.begin()
        self._release_but(self._carried_over)
        self._carried_over = set()
        if not self.reducing and not self._sharded:
            self._backward = Pass()
            return
        signature = self._uses.signature(Kind.BACKWARD if self.reducing else Kind.ACCUMULATION)
        if self._agreement.order(signature) is None:
            self._agreement.follow_forward(list(self._uses.in_order))
        self._backward = self._start(signature)

    def expect_backward(self, unit: Unit, inputs: int) -> None:
        """A call of ``unit`` joined the graph; its backward will be over when ``inputs`` gradients are complete."""
        self._readiness.expect_gradients(unit, inputs)
        if inputs:
            self._uses.differentiable.add(unit.index)

    def expect_into_inputs(self) -> None:
        """An input of the model requires a gradient, so backward computes that as well."""
        self._uses.into_inputs = True

    def expects_backward(self, unit: Unit) -> bool:
        """Whether a call of ``unit`` is expected to have a backward."""
        return self._readiness.expects_backward(unit)

    def call_after_backward(self, call: Callable[[], None]) -> None:
        """Call ``call`` when this backward, or the next, is over."""
        self._readiness.call_at_end(call)

    def pre_backward(self, unit: Unit) -> None:
        """Backward, or what runs inside it, or ``torch.autograd.grad`` needs the full weights of ``unit``."""
        for issue in self._complete(self._readiness.use_in_backward(unit)):
            issue()
        self._queue.collect_finished()
        for issue in self._unshard(unit):
            issue()

    def post_backward(self, unit: Unit, *, at_once: bool) -> None:
        """One of the gradients announced by :meth:`expect_backward` is complete.

        ``at_once``: see :meth:`Readiness.input_complete`.
        """
        for issue in self._complete(self._readiness.input_complete(unit, at_once=at_once)):
            issue()

    def _complete(self, units: Iterable[Unit]) -> Iterator[Issue]:
        """The gradients of ``units`` are complete: what is due now."""
        for unit in units:
            if unit.trainable and self.reducing:
                yield from self._backward.post_backward(unit)
            else:
                if unit.trainable:
                    unit.accumulate(self.factor)
                self._backward.reshard(unit)

    def end_backward(self) -> None:
        """Backward is over: collect what no hint announced, in order, on every rank alike."""
        for issue in self._complete(self._readiness.flush()):
            issue()
        self._readiness.complete_all()
        for issue in self._backward.finish():
            issue()
        for unit in self.units:
            if not self.reducing and not self._readiness.was_complete(unit):
                unit.accumulate(self.factor)
            elif unit.has_uncollected():
                if unit.index not in self._queue.forced:
                    self._readiness.wrong_hints.add(unit.index)
                unit.accumulate(self.factor)
        self._conclude(self._backward)
        self.finish_reductions()
        self._leave_backward()

    def abort_backward(self) -> None:
        """An error ended backward: this rank's record of it is incomplete and is dropped."""
        self._leave_backward()

    def _leave_backward(self) -> None:
        """Nothing of this backward's graph is expected any more."""
        self.in_backward = False
        self._backward = Pass()
        self._end_conversions()
        self._readiness.end()
        self._uses.forget()
        self.release_all()

    def finish_reductions(self) -> None:
        """Return when everything that was reduced has arrived."""
        self._queue.finish()

    def reduce_now(self, units: Iterable[Unit]) -> None:
        """Reduce the gradients of ``units`` outside of a backward: the same units in the same order on every rank."""
        for unit in units:
            unit.reduce_scatter(1.0)
            unit.wait_for_reduce()
