"""When the gradients of a unit are complete, by hints.

A hint: the gradients of all inputs of a unit's calls are complete. Then those of its parameters nearly always are.
Gradients that arrive later are kept and reduced in a second round at the step, and from then on the unit's hints are
ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from shardline.sharding.unit import Unit

__all__ = ["Readiness"]


class _Hints:
    """The state of the hints of one unit in one graph."""

    def __init__(self) -> None:
        self.used = False  # in a forward: gradients may come
        self.calls = 0  # forward calls that will have a backward
        self.pending = 0  # inputs of those calls whose gradient is not complete
        self.is_incomplete = False  # some call had no differentiable input, so there is no hint for its backward


class Readiness:
    """The hints of the forwards since the last backward, and the units that they report complete while one runs.

    Attributes:
        wrong_hints: units whose gradients came after their hint: they are reduced at the end of backward from then on.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.wrong_hints: set[int] = set()
        self._count = len(units)
        self._at_end: list[Callable[[], None]] = []
        self._in_backward = False
        self._forget()

    def _forget(self) -> None:
        self._hints = [_Hints() for _ in range(self._count)]
        # Of this graph. Without one it is not known which units a second backward of the same graph uses.
        self._has_forward = False
        self._almost: list[Unit] = []  # complete when autograd has accumulated what it just computed: see flush
        self._ready: set[int] = set()
        self._all_ready = False

    # -- in a forward -----------------------------------------------------------------------------------------------

    def use_in_forward(self, unit: Unit) -> None:
        """A forward uses ``unit``."""
        self._hints[unit.index].used = self._has_forward = True

    def expect_gradients(self, unit: Unit, inputs: int) -> None:
        """A call of ``unit`` joined the graph; its backward will be over when ``inputs`` gradients are complete."""
        hints = self._hints[unit.index]
        hints.calls += 1
        hints.pending += inputs
        hints.is_incomplete = hints.is_incomplete or not inputs

    def expects_backward(self, unit: Unit) -> bool:
        """Whether a call of ``unit`` is expected to have a backward."""
        return self._hints[unit.index].calls > 0

    # -- in a backward ----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A backward begins."""
        self._in_backward, self._all_ready = True, False
        self._ready = set()

    def use_in_backward(self, unit: Unit) -> Iterator[Unit]:
        """Backward uses ``unit``. Yields the units that are complete by then."""
        if unit not in self._almost:
            yield from self.flush()
        self._hints[unit.index].used = True

    def input_complete(self, unit: Unit, *, at_once: bool) -> Iterator[Unit]:
        """A gradient that :meth:`expect_gradients` announced is complete. Yields the units that are complete by then.

        Autograd accumulates the gradients of leaves in no fixed order among each other. If this input is a leaf
        (``at_once`` is false), the gradients of the parameters are complete only at the next event.
        """
        yield from self.flush()
        hints = self._hints[unit.index]
        hints.pending -= 1
        if self._in_backward and not hints.pending and not hints.is_incomplete and unit.index not in self.wrong_hints:
            self._almost.append(unit)
            if at_once:
                yield from self.flush()

    def flush(self) -> Iterator[Unit]:
        """The next event of the backward: yields the units that are complete by then."""
        while self._almost:
            unit = self._almost.pop(0)
            if unit.index not in self._ready:
                self._ready.add(unit.index)
                yield unit

    def was_complete(self, unit: Unit) -> bool:
        """Whether a hint has reported ``unit`` complete."""
        return unit.index in self._ready

    def is_ready(self, index: int) -> bool:
        """Whether a unit can be reduced: its gradients are complete. One that was not used is ready with zeros."""
        unused = self._has_forward and not self._hints[index].used and index not in self.wrong_hints
        return self._all_ready or index in self._ready or unused

    def complete_all(self) -> None:
        """Autograd is done: all gradients are complete."""
        self._all_ready = True

    # -- after a backward -------------------------------------------------------------------------------------------

    def call_at_end(self, call: Callable[[], None]) -> None:
        """Call ``call`` when this backward, or the next, is over."""
        self._at_end.append(call)

    def end(self) -> None:
        """The backward is over, or failed: nothing of its graph is expected any more."""
        self._in_backward = False
        while self._at_end:
            self._at_end.pop()()
        self._forget()
