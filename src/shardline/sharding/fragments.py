"""The engine's state by name and range: "this parameter, elements a to b", whatever the layout.

Three readings of the same buffers: :func:`local_fragments`, what this rank updates; :func:`full_weights`, every
parameter whole, one unit at a time; and :func:`collect_states` and :func:`put_states`, which carry the optimizer's
state from one layout to another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from shardline.errors import OptimizerError
from shardline.optim import placed
from shardline.plan import Entry
from shardline.sharding.bucket import RunTensors
from shardline.sharding.buffer import flat, view
from shardline.sharding.unit import Unit

__all__ = [
    "ParamState",
    "StateFragment",
    "collect_states",
    "full_weights",
    "is_per_element",
    "local_fragments",
    "put_states",
]


@dataclass(frozen=True)
class StateFragment:
    """Elements ``start`` to ``stop`` of parameter ``name`` as this rank updates them; all tensors are 1-D views.

    Attributes:
        name: first name of the parameter in the model.
        start, stop: the range, in the order in which the parameter's elements are stored.
        weight: the master weights (fp32, or the dtype of the weights where that is wider).
        grad: the gradients, averaged and unscaled, before clipping; ``None`` outside of a step.
        state: the optimizer's tensors of the same elements, by its own keys; scalars (``step``) as they are.
    """

    name: str
    start: int
    stop: int
    weight: Tensor
    grad: Tensor | None
    state: dict[str, Any]


@dataclass
class ParamState:
    """One parameter's optimizer state: per-element tensors (1-D, whole parameter, storage order) and scalars."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """The number of steps that this state has seen."""
        return int(self.scalars.get("step", 0))


def is_per_element(value: Any, param: Tensor) -> bool:
    """Whether ``value``, of the state of ``param``, has an element for each of the parameter's."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == param.shape


def local_fragments(
    runs: Iterable[RunTensors],
    optimizer: Optimizer,
    grad_of: Callable[[RunTensors], Tensor | None] = lambda run: run.param.grad,
) -> Iterator[StateFragment]:
    """Everything that this rank updates, fragment by fragment."""
    for run in runs:
        weight = flat(run.param)
        found = grad_of(run)
        grad = None if found is None else flat(found)
        state = {
            key: flat(value) if is_per_element(value, run.param) else value
            for key, value in optimizer.state.get(run.param, {}).items()
        }
        for fragment in run.fragments:
            low = fragment.offset - run.run.start
            high = low + fragment.stop - fragment.start
            yield StateFragment(
                fragment.name,
                fragment.start,
                fragment.stop,
                weight[low:high],
                None if grad is None else grad[low:high],
                {
                    key: value[low:high] if isinstance(value, Tensor) and value.numel() == weight.numel() else value
                    for key, value in state.items()
                },
            )


def full_weights(unit: Unit) -> Iterator[tuple[Entry, Tensor]]:
    """Every parameter of ``unit`` whole and in its own shape, from the masters where there are any. Collective."""
    for bucket in unit.buckets:
        whole = bucket.weights.gather_authoritative(unit.index)
        for entry in bucket.plan.entries:
            yield entry, view(whole, entry)


def collect_states(unit: Unit, runs: Sequence[RunTensors], optimizer: Optimizer) -> dict[str, ParamState]:
    """The optimizer state of every parameter of ``unit``, whole on every rank. Collective.

    ``runs`` are this rank's runs of the unit. All ranks must have taken the same steps.
    """
    found: dict[str, ParamState] = {}
    for bucket in unit.trainable:
        low, high = bucket.shard.states
        mine = [run for run in runs if bucket.weights.master is not None and _lies_in(run.param, bucket.weights.master)]
        # By parameter: an optimizer may keep other tensors for one than for another in the same bucket.
        keys = {
            fragment.name: [
                (key, str(value.dtype))
                for key, value in optimizer.state.get(run.param, {}).items()
                if is_per_element(value, run.param)
            ]
            for run in mine
            for fragment in run.fragments
        }
        scalars = {
            fragment.name: {
                key: value.clone() if isinstance(value, Tensor) else value
                for key, value in optimizer.state.get(run.param, {}).items()
                if not is_per_element(value, run.param)
            }
            for run in mine
            for fragment in run.fragments
        }
        for run in mine:
            for key, value in optimizer.state.get(run.param, {}).items():
                if isinstance(value, Tensor) and value.numel() > 1 and not is_per_element(value, run.param):
                    raise OptimizerError(
                        f"the state {key!r} of {type(optimizer).__name__} has another shape than its parameter, so it "
                        f"cannot move to another layout. With this optimizer, choose what is trained before initialize."
                    )
        # A rank whose shard is empty has no state from which to learn the keys.
        everyone = unit.comm.messages.exchange([keys, {name: _plain(values) for name, values in scalars.items()}])
        held = {name: {tuple(each) for each in theirs} for keys, _ in everyone for name, theirs in keys.items()}
        plain: dict[str, dict[str, Any]] = {}
        for _, theirs in everyone:
            plain.update(theirs)
        for entry in bucket.plan.entries:
            found[entry.param.name] = ParamState(scalars=scalars.get(entry.param.name) or _tensors(plain, entry))
        for key, dtype in sorted(set().union(*held.values())):
            part = torch.zeros(high - low, dtype=getattr(torch, dtype.split(".")[1]), device=unit.state_device)
            for run in mine:
                value = optimizer.state.get(run.param, {}).get(key)
                if value is not None:
                    part[run.run.start - low : run.run.stop - low].copy_(flat(value))
            whole = bucket.weights.gather(unit.index, part, unit.stage.states)
            for entry in bucket.plan.entries:
                if (key, dtype) in held.get(entry.param.name, ()):
                    found[entry.param.name].tensors[key] = whole[entry.offset : entry.stop].clone()
    return found


def _lies_in(part: Tensor, whole: Tensor) -> bool:
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() and (
        whole.data_ptr() <= part.data_ptr() < whole.data_ptr() + max(1, whole.numel()) * whole.element_size()
    )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.item() if isinstance(value, Tensor) else value for key, value in values.items()}


def _tensors(plain: Mapping[str, Mapping[str, Any]], entry: Entry) -> dict[str, Any]:
    return {
        key: torch.tensor(float(value)) if key == "step" else value
        for key, value in plain.get(entry.param.name, {}).items()
    }


def put_states(runs: Iterable[RunTensors], states: Mapping[str, ParamState], optimizer: Optimizer) -> None:
    """Give ``runs`` the state of the parameters that they consist of. Parameters without state begin with none.

    Raises:
        OptimizerError: if parameters that share a run have seen different numbers of steps.
    """
    groups = {param: group for group in optimizer.param_groups for param in group["params"]}
    for run in runs:
        fragments = [(fragment, states[fragment.name]) for fragment in run.fragments if fragment.name in states]
        if not any(state.tensors or state.scalars for _, state in fragments):
            continue
        steps = {fragment.name: state.steps for fragment, state in fragments}
        if len(set(steps.values())) > 1:
            raise OptimizerError(
                f"parameters whose optimizer states differ in their number of steps cannot share a run: {steps}"
            )
        target: dict[str, Any] = dict(fragments[0][1].scalars)
        for key in sorted({key for _, state in fragments for key in state.tensors}):
            sample = next(state.tensors[key] for _, state in fragments if key in state.tensors)
            whole = torch.zeros_like(run.param, dtype=sample.dtype)
            for fragment, state in fragments:
                if key in state.tensors:
                    low = fragment.offset - run.run.start
                    part = state.tensors[key][fragment.start : fragment.stop]
                    flat(whole)[low : low + part.numel()].copy_(part)
            target[key] = whole
        optimizer.state[run.param] = {
            key: placed(key, value, run.param, groups[run.param], optimizer) for key, value in target.items()
        }
