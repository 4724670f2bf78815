"""The optimizer's state in torch's own form: by parameter, whole, numbered in the order in which the user gave them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from shardline.comm import Comm
from shardline.errors import OptimizerError
from shardline.optim import prepare
from shardline.plan import ParamSpec, runs_fit
from shardline.plan.placement import Placement
from shardline.sharding.build import Layout
from shardline.sharding.fragments import ParamState, collect_states, local_fragments, put_states

__all__ = ["OptimizerState", "states_by_name"]

States = dict[str, ParamState]


@dataclass
class OptimizerState:
    """The state of ``optimizer``, which holds the runs of ``layout``.

    Attributes:
        groups: the param group of every parameter, by first name, in the user's order within each group.
        frozen_states: the state of frozen parameters.
    """

    layout: Layout
    optimizer: Optimizer
    groups: Mapping[str, int]
    frozen_states: dict[str, ParamState]
    comm: Comm

    @property
    def specs(self) -> dict[str, ParamSpec]:
        return {spec.name: spec for spec in self.layout.plan.params}

    @property
    def members(self) -> list[list[str]]:
        """The parameters of each group, in the order in which torch numbers them."""
        found: list[list[str]] = [[] for _ in self.optimizer.param_groups]
        for name, index in self.groups.items():
            found[index].append(name)
        return found

    # -- out ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a plain optimizer's holds; copies. No communication.

        Raises:
            OptimizerError: where states are sharded over ranks.
        """
        units = self.layout.units
        if self.comm.data.size > 1 and any(unit.stage.states is Placement.SHARDED for unit in units):
            raise OptimizerError(
                "optimizer.state_dict(): the optimizer's state is sharded over the ranks, and this rank holds a part "
                "of it. Call engine.full_optimizer_state_dict() on every rank (rank0_only=True leaves it on rank 0 "
                "alone), or engine.save_checkpoint(), which writes all that a resume needs."
            )
        return self._form({**self.frozen_states, **self._local()})

    def full(self, *, wanted: bool) -> dict[str, Any]:
        """The same at every stage, on CPU; empty where not ``wanted``. Collective: a unit at a time is whole.

        Raises:
            OptimizerError: on every rank, if some state has not an element for each of its parameter's.
        """
        units = self.layout.units
        if self.comm.data.size == 1 or all(unit.stage.states is Placement.REPLICATED for unit in units):
            return self._form(_on_host({**self.frozen_states, **self._local()})) if wanted else {}
        odd = next(self._of_another_shape(), None)
        if (key := next(filter(None, self.comm.messages.exchange(odd)), None)) is not None:
            raise OptimizerError(
                f"the state {key!r} of {type(self.optimizer).__name__} has another shape than its parameter, so it "
                f"cannot be put together from several ranks. Use save_checkpoint(), or stage 0 and state_dict()."
            )
        found: States = {}
        for unit in units:
            states = collect_states(unit, self.layout.runs, self.optimizer)
            if wanted:
                found.update(_on_host(states))
        return self._form({**_on_host(self.frozen_states), **found}) if wanted else {}

    def _of_another_shape(self) -> Iterator[str]:
        for run in self.layout.runs:
            for key, value in self.optimizer.state.get(run.param, {}).items():
                if isinstance(value, Tensor) and value.numel() > 1 and value.shape != run.param.shape:
                    yield key

    def _local(self) -> States:
        """By name, put together from this rank's fragments: copies."""
        found: States = {}
        specs = self.specs
        for fragment in local_fragments(self.layout.runs, self.optimizer):
            state = found.setdefault(fragment.name, ParamState())
            for key, value in fragment.state.items():
                if not isinstance(value, Tensor) or value.dim() == 0 or value.numel() != fragment.weight.numel():
                    state.scalars[key] = value.clone() if isinstance(value, Tensor) else value
                    continue
                if key not in state.tensors:
                    state.tensors[key] = value.new_zeros(specs[fragment.name].numel)
                state.tensors[key][fragment.start : fragment.stop] = value
        return found

    def _form(self, states: Mapping[str, ParamState]) -> dict[str, Any]:
        specs, members = self.specs, self.members
        numbers = {name: number for number, name in enumerate(name for group in members for name in group)}
        state = {}
        for name, number in numbers.items():
            held, spec = states.get(name), specs[name]
            if held is not None and (held.tensors or held.scalars):
                whole = {key: value.as_strided(spec.shape, spec.stride) for key, value in held.tensors.items()}
                state[number] = {**held.scalars, **whole}
        groups = [
            {**_options(group), "params": [numbers[name] for name in names]}
            for group, names in zip(self.optimizer.param_groups, members, strict=True)
        ]
        return {"state": state, "param_groups": groups}

    # -- in -----------------------------------------------------------------------------------------------------------

    def read(self, plain: Mapping[str, Any]) -> tuple[States, list[dict[str, Any]]]:
        """The states by name, and the options of each group, of a ``state_dict()`` of a plain optimizer.

        Raises:
            OptimizerError: if its groups, or the shapes in it, are not those of this optimizer.
        """
        if not isinstance(plain, Mapping) or not {"state", "param_groups"} <= plain.keys():
            raise OptimizerError(
                'load_state_dict() was given a value without "state" and "param_groups". Give it the state_dict() of '
                "an optimizer."
            )
        theirs, members = plain["param_groups"], self.members
        sizes, own = [len(group["params"]) for group in theirs], [len(names) for names in members]
        if sizes != own:
            raise OptimizerError(
                f"the loaded state has param groups of {sizes} parameters, and this optimizer has groups of {own}. "
                f"Make the same param groups before you load it."
            )
        numbers = [number for group in theirs for number in group["params"]]
        names = [name for group in members for name in group]
        entries = {
            name: plain["state"][number] for name, number in zip(names, numbers, strict=True)
            if number in plain["state"]
        }  # fmt: skip
        return states_by_name(entries, self.specs), [_options(group) for group in theirs]

    def steps_to_lay_out(self, states: Mapping[str, ParamState]) -> dict[str, int] | None:
        """Steps that each parameter's state has seen, if parameters of one run differ in that, else ``None``."""
        steps = {name: states[name].steps if name in states else 0 for name in self.specs}
        return None if runs_fit(self.layout.plan.units, steps) else steps

    def put(self, states: Mapping[str, ParamState]) -> None:
        """Give each parameter its state, of which this rank takes its part, in the dtype of the masters."""
        moved: States = {}
        for name, state in states.items():
            unit, bucket, _ = self.layout.where(name)
            dtype = bucket.grads.master_dtype
            moved[name] = ParamState(
                {
                    key: value.to(unit.state_device, dtype if value.is_floating_point() else value.dtype)
                    for key, value in state.tensors.items()
                },
                state.scalars,
            )
        trained = {name for name, spec in self.specs.items() if spec.trainable}
        self.optimizer.state.clear()
        put_states(self.layout.runs, {name: moved[name] for name in moved if name in trained}, self.optimizer)
        prepare(self.optimizer)
        self.frozen_states.clear()
        self.frozen_states.update({name: state for name, state in moved.items() if name not in trained})


def states_by_name(entries: Mapping[str, Mapping[str, Any]], specs: Mapping[str, ParamSpec]) -> States:
    """Whole states, as a plain optimizer holds them, by name of the parameter. Raises `OptimizerError` for a shape."""
    # A key that is one number for a parameter with dimensions is one for those without, too.
    numbers = {
        key
        for name, state in entries.items()
        for key, value in state.items()
        if key == "step" or not isinstance(value, Tensor) or (value.dim() == 0 and specs[name].shape)
    }
    found: States = {}
    for name, state in entries.items():
        held, spec = found.setdefault(name, ParamState()), specs[name]
        for key, value in state.items():
            if key in numbers:
                held.scalars[key] = value.clone() if isinstance(value, Tensor) else value
            elif tuple(value.shape) != tuple(spec.shape):
                raise OptimizerError(
                    f"the loaded state {key!r} of parameter {name!r} has the shape {tuple(value.shape)}, and the "
                    f"parameter {tuple(spec.shape)}. Load the state of an optimizer over the same parameters in the "
                    f"same order."
                )
            else:
                memory = torch.empty(spec.numel, dtype=value.dtype, device=value.device)
                memory.as_strided(spec.shape, spec.stride).copy_(value)
                held.tensors[key] = memory
    return found


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _on_host(states: Mapping[str, ParamState]) -> States:
    def moved(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in values.items()}

    return {name: ParamState(moved(state.tensors), moved(state.scalars)) for name, state in states.items()}
