"""What is trained: the layout of the model and what drives it, replaced when parameters are frozen or added."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardline.comm import Comm
from shardline.config import Config
from shardline.engine.notices import Notices
from shardline.errors import UsageError
from shardline.features.compiling import compiled_in
from shardline.optim.guard import guard
from shardline.sharding.admission import HeldParameters
from shardline.sharding.averages import Averages
from shardline.sharding.boundary import Boundary
from shardline.sharding.bucket import Bucket
from shardline.sharding.build import Layout, group_parameters, lay_out_again, needs_full_params, resting_stage
from shardline.sharding.fragments import ParamState, is_per_element
from shardline.sharding.hooks import Hooks
from shardline.sharding.precision import Precision
from shardline.sharding.schedule import Schedule
from shardline.sharding.step import Update
from shardline.sharding.unit import Unit

__all__ = ["Trainables"]

ShardedGradOf = Callable[[Bucket, int], Tensor | None]


class Trainables:
    """The layout of one model, and the schedule, hooks and boundary that were made for it.

    Attributes:
        layout: how the model lies on this rank.
        schedule: gathers, releases and reduces its units.
        hooks: call the schedule as the model runs.
        boundary: ends windows; ``None`` without an optimizer.
        params: the parameters that are trained.
        groups: the param group of every parameter that the optimizer was given, frozen ones too, by first name.
        frozen_states: the optimizer state of frozen parameters, whole on every rank.
        averages: the moving averages of the weights.
        states_are_away: whether masters and optimizer state were moved to host memory until training continues.
        is_closed: whether the model has ordinary parameters again.
    """

    layout: Layout
    schedule: Schedule
    hooks: Hooks
    params: list[nn.Parameter]

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        optimizer: Optimizer | None,
        groups: dict[str, int],
        config: Config,
        precision: Precision,
        comm: Comm,
        *,
        on_forward: Callable[[], Hooks],
        on_call: Callable[[bool, Any], None] | None,
        make_boundary: Callable[[Update, Schedule], Boundary],
    ) -> None:
        self._on_output: Callable[[Any], None] | None = None
        self._sharded_grad: ShardedGradOf | None = None
        self.layout, self.groups = layout, groups
        self.frozen_states: dict[str, ParamState] = {}
        self.averages = Averages()
        self.boundary: Boundary | None = None
        self._model, self._optimizer = model, optimizer
        self._config, self._precision, self._comm = config, precision, comm
        self._on_forward, self._on_call, self._make_boundary = on_forward, on_call, make_boundary
        self._held_parameters = HeldParameters(model)
        self.states_are_away = self.is_closed = False
        self._arrange()

    def _arrange(self) -> None:
        """Make the schedule, hooks and boundary of the current layout."""
        zero, units = self._config.zero_optimization, self.layout.units
        self._comm.watch.names = [unit.name for unit in units]
        self._requires_grad = self._read_requires_grad()
        self.params = [param for unit in units for bucket in unit.trainable for param in bucket.params]
        self.schedule = Schedule(
            units,
            self._comm.all_gather_ints,
            prefetch=zero.stage3_prefetch_bucket_size > 0,
            reshard_after_forward=zero.reshard_after_forward,
            max_live=zero.stage3_max_live_parameters,
            on_host=self._comm.device.type == "cpu",
        )
        self._make_hooks()
        self._set_sharded_grad()
        if self._optimizer is not None:
            update = Update(units, self._comm, self._optimizer, self.layout.runs)
            self.boundary = self._make_boundary(update, self.schedule)

    def _make_hooks(self) -> None:
        self.hooks = Hooks(
            self._model, self.layout.units, self.schedule, self._on_forward, self._on_call, compiled_in(self._model),
            self._on_output,
        )  # fmt: skip

    def _set_sharded_grad(self) -> None:
        for unit in self.layout.units:
            for bucket in unit.trainable:
                bucket.sharded_grad = self._sharded_grad

    def serve_loop(self, on_output: Callable[[Any], None], sharded_grad: ShardedGradOf) -> None:
        """Serve a loop that calls the model and uses gradients itself.

        Args:
            on_output: see :class:`shardline.sharding.hooks.Hooks`.
            sharded_grad: see :class:`shardline.sharding.bucket.Bucket`.
        """
        self._on_call, self._on_output, self._sharded_grad = None, on_output, sharded_grad
        self.renew_hooks()
        self._set_sharded_grad()

    def renew_hooks(self) -> None:
        """Make the hooks again, after modules were compiled or the callbacks changed."""
        self.hooks.remove()
        self._make_hooks()

    def check_open(self, what: str) -> None:
        """Raise if ``what`` is called after :meth:`close`."""
        if self.is_closed:
            raise UsageError(f"{what} was called after destroy(). Make a new engine with shardline.initialize.")

    def check_trains(self, what: str) -> Boundary:
        """Return the boundary. Raise if ``what`` is called without an optimizer, or after :meth:`close`."""
        self.check_open(what)
        self.averages.check_hidden(what)
        if self.boundary is None:
            raise UsageError(
                f"{what} needs an optimizer, and this engine has none. Give initialize an optimizer, or an "
                f'"optimizer" section in the configuration.'
            )
        return self.boundary

    # -- what changes -----------------------------------------------------------------------------------------------

    def check_before_forward(self, *, forget_edits: bool) -> None:
        """Check that the model still holds its parameters, and these the engine's tensors.

        Args:
            forget_edits: whether to forget the values that edited parameters had before.
        """
        self._held_parameters.check()
        for unit in self.layout.units:
            unit.check_in_place()
        if forget_edits:
            for unit in self.layout.units:
                unit.forget_before_edit()

    def _read_requires_grad(self) -> dict[str, bool]:
        return {name: param.requires_grad for name, param in self.layout.params.items()}

    def have_changed(self) -> bool:
        """Whether parameters were frozen, unfrozen or added to the optimizer."""
        return self._optimizer is not None and self._requires_grad != self._read_requires_grad()

    def _add_group(self, add: Callable[[dict[str, Any]], None], group: dict[str, Any]) -> None:
        """``optimizer.add_param_group`` with parameters of the model: they join at the next forward."""
        self._held_parameters.check()
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        joining = group_parameters(self._model, [{"params": params}])
        known = sorted(set(joining) & set(self.groups))
        if known:
            raise UsageError(f"parameter {known[0]!r} is in a param group of this optimizer already.")
        add({**group, "params": params})
        index = len(self._optimizer.param_groups) - 1 if self._optimizer is not None else 0
        self.groups.update(dict.fromkeys(joining, index))
        self._requires_grad = {}

    def lay_out_again(self, state_steps: Mapping[str, int] | None = None) -> None:
        """Lay the model out again, keeping all state; the last step's verdict was acted on. Collective.

        Args:
            state_steps: the steps that each parameter's state has seen, where that state is still to be loaded.
        """
        optimizer = self._optimizer
        if optimizer is None:
            return
        self.averages.check_hidden("a forward after requires_grad or the optimizer's parameters have changed")
        self.adopt_edits()
        self.schedule.release_all()
        self.hooks.remove()
        aligned = needs_full_params(optimizer, resting_stage(self._config, self.layout.offload), self._comm.shard.size)
        self.layout = lay_out_again(
            self.layout, self._config, self._precision, self._comm, optimizer, self.groups, self.frozen_states,
            self.averages, self.on_sealed_access, param_aligned=aligned, state_steps=state_steps,
        )  # fmt: skip
        self._arrange()

    def lay_out_by_state_steps(self, state_steps: Mapping[str, int]) -> None:
        """Lay the model out for states that are loaded next: parameters whose states have seen
        different numbers of steps share no run."""
        if self._optimizer is not None:
            self._optimizer.state.clear()
        self.frozen_states.clear()
        self.lay_out_again(state_steps)

    def check_parameters(self) -> None:
        """Check that the model still holds its parameters, under the same names."""
        self._held_parameters.check()

    def adopt_edits(self) -> None:
        """Bring what the user wrote into weights into the masters."""
        for unit in self.layout.units:
            unit.adopt_edits(restorable=True)

    def on_sealed_access(self, unit: Unit) -> bool:
        """A sealed parameter of ``unit`` is used outside of its module. Returns whether it was gathered."""
        return self.hooks.on_sealed_access(unit)

    @property
    def in_use(self) -> bool:
        """Whether a forward runs, or weights are gathered for the user."""
        return any(unit.holds for unit in self.layout.units)

    def guard_optimizer(
        self,
        *,
        zero_grad: Callable[[], None],
        state_dict: Callable[[], dict[str, Any]],
        load_state_dict: Callable[[Mapping[str, Any]], None],
    ) -> Callable[[], None]:
        """Route the methods of the optimizer, if there is one, through the engine; return what undoes it."""
        if self._optimizer is None:
            return lambda: None
        return guard(
            self._optimizer,
            stepping=lambda: self.boundary is not None and self.boundary.update.applying,
            zero_grad=zero_grad,
            add_group=self._add_group,
            state_dict=state_dict,
            load_state_dict=load_state_dict,
        )

    def move_states(self, *, away: bool) -> int:
        """Move masters, averages and optimizer state to host memory, or back to their own device.

        Masters that are the weights themselves stay. Returns how many bytes were moved.
        """
        self.states_are_away, moved = away, 0
        for unit in self.layout.units:
            home = torch.device("cpu") if away else unit.state_device
            for bucket in unit.trainable:
                runs = [run for run in self.layout.runs if run.bucket is bucket]
                moved += bucket.move_masters(runs, home)
                for run in runs:
                    state = {} if self._optimizer is None else self._optimizer.state.get(run.param, {})
                    for key, value in state.items():
                        if is_per_element(value, run.param) and value.device != home:
                            state[key] = value.to(home)
                            moved += value.nbytes
        return moved

    def bring_states(self) -> None:
        """Move the states back to their own device, if they were moved away."""
        if self.states_are_away:
            self.move_states(away=False)

    def note_new_weights(self, notices: Notices) -> None:
        """The weights were updated: make autograd reject graphs of the old ones, and emit notices about edits."""
        torch.autograd.graph.increment_version(self.params)
        if not self.averages.followed and self.averages.exist(self.layout.units):
            self.averages.drop(self.layout.units)
            notices.once(
                "the checkpoint holds a moving average of the weights, which no shardline.EMA goes on with: it is "
                "dropped. Make the EMA before the first step to keep it"
            )
        for unit in self.layout.units:
            unit.note_versions()
            for bucket in unit.buckets:
                if (rounded_away := bucket.edits.rounded_away) is not None:
                    notices.once(
                        f"frozen parameter {rounded_away!r} is edited again and again, and most of its elements "
                        f"stay what they were: {bucket.plan.dtype} rounds away what a moving average adds to them. "
                        f"Keep its modules in fp32 (data_types.module_dtypes).",
                        key="rounded_away",
                    )

    def drop_gradients(self) -> None:
        """Discard all gradients, also those in flight."""
        self.schedule.finish_reductions()
        for unit in self.layout.units:
            unit.drop_grads()
        if self.boundary is not None:
            self.boundary.update.unguard_grads()

    def close(self) -> None:
        """Give the model ordinary parameters again. Collective at stage 3."""
        for unit in self.layout.units:
            unit.wait_for_unshard()
            unit.detach_params()
        self.is_closed = True
        self.boundary = None
        # These refer back to the engine. Without them memory of the device is free with the last reference to the
        # engine, not when the garbage collector finds the cycle.
        del self.layout, self.schedule, self.hooks, self.params
        del self._on_forward, self._on_call, self._on_output, self._sharded_grad, self._make_boundary
