"""One parameter's gradient, master and optimizer state by name: whole, or this rank's elements, at any moment."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardline.comm import Comm
from shardline.engine.trainables import Trainables
from shardline.engine.weights import gathered
from shardline.engine.window_grads import WindowGrads
from shardline.errors import UsageError
from shardline.runtime.modes import outside_modes
from shardline.sharding.bucket import RunTensors
from shardline.sharding.buffer import in_storage_order
from shardline.sharding.flat_grads import cut
from shardline.sharding.fragments import StateFragment, collect_states, full_weights, local_fragments

__all__ = ["ParameterAccess"]


class ParameterAccess:
    """What an engine keeps of one parameter. Made by :meth:`Engine.parameter`.

    Every method is collective: all ranks call it alike. Whole tensors have the parameter's shape, lie on the engine's
    device and are copies; what is set is the same on every rank.

    Attributes:
        name: its first name in the model.
    """

    def __init__(self, name: str, param: nn.Parameter, trainables: Trainables, grads: WindowGrads, comm: Comm) -> None:
        self.name = name
        self._param, self._trainables, self._grads, self._comm = param, trainables, grads, comm

    # -- gradients, between backward and step -------------------------------------------------------------------------

    @outside_modes
    def full_grad(self) -> Tensor | None:
        """The gradient of this window so far, late ones included: averaged over the ranks and without a loss scale.

        In the dtype in which gradients are added up. None, or zeros, where no backward gave any.

        Raises:
            UsageError: without an optimizer.
        """
        found = self._grads.full(self.name) if self._is_trained("full_grad()") else None
        return None if found is None else found.to(self._comm.device)

    @outside_modes
    def set_full_grad(self, value: Tensor) -> None:
        """Make ``value`` that gradient. Of no effect where there is none.

        Raises:
            UsageError: for another shape; for a parameter that is not trained.
        """
        self._check(value, "set_full_grad()")
        self._grads.put(self.name, value)

    # -- masters and optimizer state ----------------------------------------------------------------------------------

    @outside_modes
    def full_master(self) -> Tensor:
        """The master weights; those in which the model computes where there are no others."""
        unit, _, _ = self._trainables.layout.where(self.name)
        unit.adopt_edits(restorable=True)
        # To its end: each bucket is a collective, and the next one may come into the same memory.
        found = {entry.param.name: full.detach().clone() for entry, full in full_weights(unit)}
        return found[self.name].to(self._comm.device)

    @outside_modes
    def set_full_master(self, value: Tensor) -> None:
        """Make ``value`` the master weights, and rounded the weights.

        Raises:
            UsageError: for another shape.
        """
        self._check_shape(value, "set_full_master()")
        unit, bucket, entry = self._trainables.layout.where(self.name)
        with gathered([unit], self._trainables.hooks, self._comm.watch.status, write=True), torch.no_grad():
            self._param.copy_(value)
        self._comm.wait_for_readers()
        bucket.weights.store_master(entry, value.detach())

    @outside_modes
    def full_state(self, key: str) -> Tensor | None:
        """The optimizer's state ``key`` (such as ``"exp_avg"``); None where there is none, as before the first step.

        A scalar state (``"step"``) has no dimensions.
        """
        if not self._is_trained("full_state()"):
            return None
        unit, _, entry = self._trainables.layout.where(self.name)
        state = collect_states(unit, self._trainables.layout.runs, self._optimizer)[self.name]
        if key in state.tensors:
            elements = state.tensors[key].to(self._comm.device)
            return elements.as_strided(entry.param.shape, entry.param.stride).contiguous()
        value = state.scalars.get(key)
        return None if value is None else torch.as_tensor(value)

    @outside_modes
    def set_full_state(self, key: str, value: Tensor) -> None:
        """Make ``value`` that state.

        Raises:
            UsageError: for another shape; where there is no such state yet.
        """
        self._check(value, "set_full_state()")
        entry = self._trainables.layout.where(self.name)[2]
        elements = in_storage_order(value.detach(), entry)
        for fragment in self._local():
            state = fragment.state.get(key)
            if not isinstance(state, Tensor) or state.numel() != fragment.stop - fragment.start:
                raise UsageError(f"parameter {self.name!r} has no state {key!r} with an element for each of its own.")
            state.copy_(elements[fragment.start : fragment.stop])

    # -- this rank's elements -----------------------------------------------------------------------------------------

    @outside_modes
    def fragments(self) -> list[StateFragment]:
        """What this rank updates of the parameter: master, state and the window's gradient, averaged and unscaled.

        All are views, and changes of them count: where states are replicated (stage 0), every rank makes the same.
        Empty where the rank holds nothing of it.
        """
        if not self._is_trained("fragments()"):
            return []
        self._grads.spread(self.name)
        return list(self._local())

    def _local(self) -> list[StateFragment]:
        layout = self._trainables.layout
        bucket = layout.where(self.name)[1]
        runs = [run for run in layout.runs if run.bucket is bucket]
        found = local_fragments(runs, self._optimizer, _collected)
        return [fragment for fragment in found if fragment.name == self.name]

    @property
    def _optimizer(self) -> Optimizer:
        return self._trainables.check_trains("parameter()").update.optimizer

    # -- checks -------------------------------------------------------------------------------------------------------

    def _is_trained(self, what: str) -> bool:
        self._trainables.check_trains(what)
        return self._trainables.layout.where(self.name)[1].plan.trainable

    def _check(self, value: Tensor, what: str) -> None:
        if not self._is_trained(what):
            raise UsageError(f"{what}: parameter {self.name!r} is not trained, so it has neither gradient nor state.")
        self._check_shape(value, what)

    def _check_shape(self, value: Tensor, what: str) -> None:
        if value.shape != self._param.shape:
            raise UsageError(
                f"{what} of parameter {self.name!r} was given a tensor of shape {tuple(value.shape)}; it has the shape "
                f"{tuple(self._param.shape)}."
            )


def _collected(run: RunTensors) -> Tensor | None:
    """The reduced gradients of ``run`` where they are, not a copy in the dtype of the masters."""
    grads = run.bucket.grads
    return None if grads.reduced is None else cut(grads.reduced, run.run, run.bucket.shard.states[0])
