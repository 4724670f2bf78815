"""The accumulation window: what this rank has done since the last step, and how far training has come.

Gradients in a window are sums. ``backward`` has already divided each loss by the configured accumulation; what else
divides them is known only when the window ends: the sum of the ranks' weights over that accumulation.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import Tensor

__all__ = ["Gradients", "Progress", "State", "Window"]


class State(Enum):
    """How far a window has come on this rank."""

    EMPTY = "nothing has happened"
    HANDED_OUT = "the engine's loader has handed out its first batch"
    FORWARD = "a forward with gradients has run; its backward has not"
    ACCUMULATING = "backwards or micro-steps were counted; no forward waits for its backward"
    ENDED = "its step runs"


_BEFORE = {
    State.HANDED_OUT: {State.EMPTY, State.HANDED_OUT},
    State.FORWARD: {State.EMPTY, State.HANDED_OUT, State.FORWARD, State.ACCUMULATING},
    State.ACCUMULATING: {State.EMPTY, State.HANDED_OUT, State.FORWARD, State.ACCUMULATING},
    State.ENDED: {State.FORWARD, State.ACCUMULATING},
}
"""The states that each state may follow. A window becomes EMPTY from any of them."""


class Gradients(Enum):
    """Where the gradients of the last backward are."""

    NONE = "there was no backward"
    LOCAL = "on this rank: they wait for a reduction"
    REDUCED = "summed over the ranks"


class Window:
    """The only owner of the accumulation window of one rank.

    Attributes:
        accumulation: what every backward is divided by before the end is known: the configured accumulation.
        forced_boundary: whether the user set the current micro-step to end the window; ``None``: it is counted.
        state, gradients: how far it has come.
        steps: micro-steps so far.
        weight: of this rank's gradients in the average: in full batches, or as the user gave it.
        samples, tokens: how many the micro-steps held.
        backwards: how many have begun.
        loss: sum of the reported losses (0-dim), each times the share of its batch.
        counted: sum of the weights of these losses: ``loss * accumulation / counted`` is their mean.
        divided_by: the divisor that was already applied to the gradients, which are sums.
        is_complete: whether everything since the last backward was reduced, late gradients included.
    """

    def __init__(self, accumulation: int) -> None:
        self.accumulation = accumulation
        self.forced_boundary: bool | None = None
        self.restart()

    def restart(self, *, steps: int = 0) -> None:
        """Start over with nothing accumulated, ``steps`` micro-steps into the window (for ``zero_grad()``)."""
        self.state = State.ACCUMULATING if steps else State.EMPTY
        self.gradients = Gradients.NONE
        self.steps, self.weight, self.samples, self.tokens, self.backwards = steps, 0.0, 0, 0, 0
        self.loss: Tensor | None = None
        self.counted, self.divided_by, self.is_complete = 0.0, 1.0, False
        self._weighted = False  # the user gave a weight
        self._shares = 0.0  # of all backwards, in full batches
        self._batches = 0  # backwards that followed a forward

    def _enter(self, state: State) -> None:
        if self.state not in _BEFORE[state]:
            raise AssertionError(f"a window went from {self.state.name} to {state.name}")
        self.state = state

    @property
    def is_open(self) -> bool:
        """Whether anything of it has happened."""
        return self.state is not State.EMPTY

    @property
    def at_start(self) -> bool:
        """Whether no forward, backward or micro-step has happened: a resume would begin with the next batch."""
        return self.state in _BEFORE[State.HANDED_OUT]

    @property
    def at_boundary(self) -> bool:
        """Whether the current micro-step is the last."""
        return self.steps + 1 >= self.accumulation if self.forced_boundary is None else self.forced_boundary

    def hand_out(self) -> None:
        """The engine's loader hands out a batch, and the window is :attr:`at_start`."""
        self._enter(State.HANDED_OUT)

    def begin_forward(self) -> None:
        """A forward with gradients begins. Inside a step, from a hook of the user's, it belongs to no window."""
        if self.state is not State.ENDED:
            self._enter(State.FORWARD)

    def begin_backward(self, share: float, *, reducing: bool) -> None:
        """A backward begins.

        Args:
            share: how much its batch holds, in full ones.
            reducing: whether its gradients are reduced as they come.
        """
        self.backwards += 1
        self._shares += share
        self._batches += self.state is State.FORWARD
        self.join(reducing=reducing)

    def join(self, *, reducing: bool) -> None:
        """The reductions of a backward begin, also on a rank that had no backward of its own."""
        self.gradients = Gradients.REDUCED if reducing else Gradients.LOCAL
        self.is_complete = False
        if self.state is not State.ENDED:
            self._enter(State.ACCUMULATING)

    def note_reduced(self) -> None:
        """The gradients that waited for a reduction were reduced."""
        self.gradients = Gradients.REDUCED

    def add_loss(self, loss: Tensor, share: float = 1.0) -> None:
        """The loss of a batch that holds ``share`` of a full one, over ``accumulation``."""
        loss = loss if share == 1.0 else loss * share
        self.loss = loss if self.loss is None else self.loss + loss

    def add_step(self, share: float, weight: float | None, samples: int) -> None:
        """A micro-step is over. It counts as ``share`` of a full batch, or as the ``weight`` that the user gave."""
        self.steps += 1
        self.weight += share if weight is None else weight
        self.counted += share if weight is None else weight
        self._weighted = self._weighted or weight is not None
        self.samples += samples
        if self.state is not State.FORWARD:
            self._enter(State.ACCUMULATING)

    def end(self) -> None:
        """The last micro-step was counted: gradients are averaged over the weights of all."""
        self.weight /= self.divided_by
        self._enter(State.ENDED)

    def end_as_sum(self) -> int:
        """The user ends the window: its gradient is the sum of those of its backwards, averaged over the ranks.

        Returns:
            How many micro-steps it holds, by its backwards, that no call of ``step`` has counted.
        """
        if not self._weighted:
            self.weight = self.accumulation * (self._shares / self.backwards if self.backwards else 1.0)
        uncounted = max(min(self._batches, self.accumulation) - self.steps, 0)
        self.steps += uncounted
        self.counted += uncounted
        self.end()
        return uncounted


@dataclass
class Progress:
    """How far the training of one engine has come, over all ranks, and what its last step did.

    Attributes:
        global_steps: optimizer steps, skipped ones included.
        micro_steps: calls of ``step()``.
        global_samples: samples of all ranks together that the steps have seen.
        skipped_steps: steps that were skipped.
        average_updates: how often a moving average of the weights has followed them.
        norm: of the last step's averaged gradients before clipping.
        applied: whether the last call of ``step()`` changed the weights, as far as the host knows.
        exit_requested: whether some rank was asked to save and end.
    """

    global_steps: int = 0
    micro_steps: int = 0
    global_samples: int = 0
    skipped_steps: int = 0
    average_updates: int = 0
    norm: Tensor | float | None = None
    applied: bool = False
    exit_requested: bool = False
