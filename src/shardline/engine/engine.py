"""The engine: glue between the user's loop (forward, backward, step) and the units, the schedule and the update."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardline.checkpoint.engine.checkpointer import Checkpointer
from shardline.checkpoint.engine.parts import Parts
from shardline.checkpoint.engine.window import WindowStart
from shardline.comm import Comm
from shardline.config import Config
from shardline.data import Loader
from shardline.data.place import Place
from shardline.data.short import ShortBatches
from shardline.data.split import Position
from shardline.engine.leftovers import grad_scale, is_divided_by, is_scaled_by, is_some_loss_scaled
from shardline.engine.report import Ended, Reporter
from shardline.engine.weights import full_state_dict, gathered, units_of
from shardline.errors import UsageError
from shardline.events import Events, Notice
from shardline.features.compiling import compile_blocks, compiled_in
from shardline.optim import lr
from shardline.optim.guard import guard
from shardline.optim.options import Options
from shardline.plan.placement import STAGES, Placement
from shardline.runtime.modes import outside_modes
from shardline.runtime.topology import Topology
from shardline.sharding.admission import Contents
from shardline.sharding.alike import Alike
from shardline.sharding.boundary import Boundary, no_backward
from shardline.sharding.build import Layout, group_parameters, regroup
from shardline.sharding.containers import replace_tensors
from shardline.sharding.fragments import ParamState, StateFragment, local_fragments
from shardline.sharding.gradient import drop_grads
from shardline.sharding.hooks import Hooks, watch_outputs
from shardline.sharding.precision import LossScaler, Precision
from shardline.sharding.scaling import PLAIN, multiplied, multiplied_by
from shardline.sharding.schedule import Schedule
from shardline.sharding.step import Update
from shardline.sharding.unit import Unit
from shardline.sharding.window import Progress, Window

__all__ = ["Engine", "StepHook"]

StepHook = Callable[[list[StateFragment]], None]

_ENGINES: WeakValueDictionary[int, Engine] = WeakValueDictionary()
"""Those of this process that are in use, in the order in which all ranks made them."""


@dataclass
class Handle:
    """Takes a registered function off again."""

    hooks: list[StepHook]
    hook: StepHook

    def remove(self) -> None:
        if self.hook in self.hooks:
            self.hooks.remove(self.hook)


class Engine(nn.Module):
    """A model that trains itself over many ranks. Made by :func:`shardline.initialize`.

    It is an ``nn.Module`` whose child ``module`` is the user's model; attributes that it does not have are the model's.

    Attributes:
        module: the user's model; its parameters are views of the engine's buffers.
        optimizer: a ``torch.optim.Optimizer`` over this rank's runs, or ``None``.
        lr_scheduler: stepped after every applied step (or undone after a skipped one); ``None`` to step it oneself.
        training_dataloader: the loader of ``training_data``, or ``None``.
        config (Config): the typed configuration.
        topology (Topology): rank, world size, device of this process in the whole job.
        events: the stream of what happens; ``events.subscribe(fn)`` to listen.
        progress: how many steps and samples there were, and what the last step did.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        optimizer: Optimizer | None,
        groups: dict[str, int],
        config: Config,
        precision: Precision,
        topology: Topology,
        comm: Comm,
        *,
        whole: bool,
    ) -> None:
        super().__init__()
        self.module = model
        self.optimizer = optimizer
        self.lr_scheduler: Any = None
        self.training_dataloader: Loader | None = None
        self.config, self.topology = config, topology
        self.precision, self.comm = precision, comm
        self.events = Events()
        self.scaler = LossScaler.from_config(config)
        self.progress = Progress()
        self._layout, self._groups, self._whole = layout, groups, whole
        self._parked: dict[str, ParamState] = {}
        self._trained = {name: param.requires_grad for name, param in layout.params.items()}
        self._window = Window(config.gradient_accumulation_steps)
        self.window_start = WindowStart(model, comm.device)
        self.checkpoints = Checkpointer(self)
        self.client_state: dict[str, Any] = {}
        self._no_sync = False
        self._loader_position: Position | None = None
        self._share = 1.0
        self._handed: int | None = None  # samples that the engine's loader has handed out since the last micro-step
        self._before: list[StepHook] = []
        self._after: list[StepHook] = []
        self._told: set[str] = set()
        self._short = ShortBatches(config.train_micro_batch_size_per_gpu)
        self._called = False  # a forward or method of the model runs that was called through the engine
        self._first_loss = self._first_plain = True
        self._grad_scale: Tensor | None = None  # of a GradScaler that was left in the loop
        self._scheduled: int | None = None  # where the scheduler was after the last step
        self._ended: Ended | None = None  # the last step, until its verdict is known
        self._unschedule: Callable[[], bool] | None = None  # takes the scheduler's step after it back
        self._destroyed = False
        self._compiled = False
        self._undo: list[Callable[[], None]] = []  # what was done to model and optimizer beside the hooks
        self._reporter = Reporter(self.events, comm.device, phases=config.wall_clock_breakdown)
        self._contents = Contents(model)
        self._alike = Alike([Options(lambda: self.optimizer), Place(lambda: self.training_dataloader)])
        self._arrange()
        if optimizer is not None:
            self._undo.append(
                guard(optimizer, stepping=self._is_stepping, zero_grad=self.zero_grad, add_group=self._add_group)
            )
        _ENGINES[id(self)] = self

    def _arrange(self) -> None:
        """Schedule, hooks and update for the current layout."""
        zero = self.config.zero_optimization
        units = self._layout.units
        self.schedule = Schedule(
            units,
            self.comm.ask,
            prefetch=zero.stage3_prefetch_bucket_size > 0,
            reshard_after_forward=zero.reshard_after_forward,
            max_kept=zero.stage3_max_live_parameters,
            on_host=self.comm.device.type == "cpu",
        )
        self._hooks = self._make_hooks()
        self._boundary: Boundary | None = None
        if self.optimizer is not None:
            update = Update(units, self.comm, self.optimizer, self._layout.runs)
            self._boundary = Boundary(update, self.schedule, self.scaler, self.config, self.progress, self._alike)
        self._trainable = [param for unit in units for bucket in unit.trainable for param in bucket.params]

    def _make_hooks(self) -> Hooks:
        sees_calls = self.precision.autocast is not None or self.precision.cast_inputs
        on_call = self._see_call if sees_calls else None
        compiled = compiled_in(self.module)
        return Hooks(self.module, self._layout.units, self.schedule, self._begin_forward, on_call, compiled)

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on inputs whose floating tensors are cast to the compute dtype. Returns what it returns."""
        self._check_alive("forward")
        if self.training_dataloader is None and torch.is_grad_enabled():
            self._short.see(args, kwargs)
        if self.precision.cast_inputs:
            args, kwargs = self.precision.cast(args), self.precision.cast(kwargs)
        try:
            with self._reporter.phase("forward"):
                output = self._under_autocast(self.module, *args, **kwargs)
        except BaseException as error:
            self._hooks.unwind()
            self._hooks.explain(error)
            self.precision.explain(error, self.module)
            raise
        if torch.is_grad_enabled() and self._trainable:
            watch_outputs(output, self._foreign_backward, self._end_backward, self._trainable)
        return output

    def _under_autocast(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``call`` returns, under autocast where it is configured; then in fp32, for what is computed of it."""
        before, self._called = self._called, True
        try:
            dtype = self.precision.autocast
            if dtype is None:
                return call(*args, **kwargs)
            with torch.autocast(self.comm.device.type, dtype=dtype):
                output = call(*args, **kwargs)
        finally:
            self._called = before
        return replace_tensors(output, lambda tensor: tensor.float() if tensor.dtype is dtype else tensor)

    def _method(self, method: MethodType) -> Callable[..., Any]:
        """A method of the model beside ``forward``: under autocast as that, but its arguments come as they are."""

        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return self._under_autocast(method, *args, **kwargs)
            except Exception as error:
                if self.precision.explain(error, self.module):
                    error.add_note(
                        f"engine(...) casts inputs to {self.precision.compute}. engine.{method.__name__}(...) takes "
                        f"them as they are: give it tensors of that dtype."
                    )
                raise

        return call

    def _see_call(self, is_model: bool, given: Any) -> None:
        """A module of the model is called. Says so once where that does without what calls through the engine get."""
        if self._called:
            return
        if self.precision.autocast is not None and not torch.is_autocast_enabled(self.comm.device.type):
            self._tell_once(
                "engine.module, or a part of it, was called past the engine, where torch_autocast does not reach: it "
                "runs in the dtype of the weights. Call engine(...) or engine.method(...), or enter torch.autocast."
            )
        if is_model and self.precision.cast_inputs and (other := self.precision.not_cast(given)) is not None:
            self._tell_once(
                f"engine.module(...) was given a tensor of {other}, and weights are {self.precision.compute}: only "
                f"engine(...) casts its inputs. Call that, or give tensors of {self.precision.compute}."
            )

    @outside_modes
    def _begin_forward(self) -> Hooks:
        """The model's forward begins outside of any backward: the moment to notice what changed since the last one.

        Returns the hooks of the layout that serves this forward.
        """
        if torch.is_grad_enabled():
            self._window.begin_forward()
            if self.window_start.random is None:
                self.window_start.mark(self._loader_position)
        if not self._window.backwards:
            self._check_held()
            if torch.is_grad_enabled():
                for unit in self._layout.units:
                    unit.forget_before_edit()
            if self.optimizer is not None and self._trained != self._requires_grad():
                self._regroup()
        return self._hooks

    def _requires_grad(self) -> dict[str, bool]:
        """Which parameters their owner wants trained now."""
        return {name: param.requires_grad for name, param in self._layout.params.items()}

    def _batch_comes(self, position: Position) -> None:
        """The engine's loader hands out a batch. If it is the first of a window, this is where a resume begins."""
        if self.training_dataloader is not None:
            self._handed = (self._handed or 0) + self.training_dataloader.samples
        if self._window.at_start:
            self._window.hand_out()
            self.window_start.mark(position)

    def _check_held(self) -> None:
        """See that the model holds the parameters that it held, and these the engine's tensors."""
        self._contents.check()
        for unit in self._layout.units:
            unit.check_in_place()

    # -- backward ---------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Add the gradients of ``loss`` (scalar) to this window's, and reduce them where the stage says so.

        ``loss`` is divided by the accumulation steps (unless ``scale_wrt_gas`` is false: it is already) and multiplied
        by the loss scale; a batch of the engine's own loader that is smaller than the others counts for its samples.

        Plain ``loss.backward()`` means the same, but in fp16 its loss is not multiplied: the gradients are those of
        this method, as far as they are not lost below 6e-8 on their way. Use this method there; a notice says so.

        Returns:
            ``loss`` over the accumulation steps, detached.

        Raises:
            UsageError: if ``loss`` is no scalar with a gradient, or there is no optimizer.
        """
        self._check_trains("backward()")
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            if isinstance(loss, Tensor) and loss.numel() == 1:
                found += " that does not require grad"
            raise UsageError(
                f"engine.backward() was given {found}. Give it a scalar loss that depends on the model's parameters, "
                f"computed with gradients enabled."
            )
        divisor = self._window.unit if scale_wrt_gas else 1
        factor = self._micro_share() / divisor * self.scaler.scale
        foreign = self._left_on(loss, divisor)
        engines = list(_ENGINES.values())  # a backward reaches every engine in its graph
        if factor != 1.0:  # what lies there already would be taken for a part of this backward
            for engine in engines:
                engine._collect_unseen()
        self._start_backward(factor=1.0)
        with multiplied(factor, by_accumulation=scale_wrt_gas):
            try:
                with self._reporter.phase("backward"):
                    scaled = loss.float() if loss.dtype is torch.float16 else loss
                    root = torch.full_like(scaled, factor)
                    scaled.backward(root if foreign is None else root / foreign, retain_graph=retain_graph)
            except BaseException:
                self.schedule.abort_backward()
                raise
            for engine in engines:
                if engine is not self:
                    engine._collect_unseen()
        self._end_backward()
        return self._report(loss, divisor, foreign)

    @outside_modes
    def _report(self, loss: Tensor, divisor: float, foreign: Tensor | None) -> Tensor:
        reported = loss.detach() / divisor
        if foreign is not None:
            reported = reported / foreign
        self._window.add_loss(reported)
        return reported

    def _left_on(self, loss: Tensor, divisor: int) -> Tensor | None:
        """The scale of a GradScaler that was left in the loop, to take out again. The first backward decides."""
        if self._first_loss:
            self._first_loss = False
            self._grad_scale = grad_scale(loss)
            if self._grad_scale is not None:
                self._tell_once(
                    "engine.backward was given scaler.scale(loss) of a torch.amp.GradScaler; the scale was taken out "
                    "again. Leave the scaler away: loss.backward(), scaler.step and scaler.update have no meaning here."
                )
            if divisor > 1 and is_divided_by(loss, divisor):
                self._tell_once(
                    f"the loss given to engine.backward was divided by {divisor} already, and is divided by the "
                    f"{divisor} accumulation steps once more. Leave the division away, or pass scale_wrt_gas=False."
                )
            return self._grad_scale
        known = self._grad_scale
        return known if known is not None and is_scaled_by(loss, known) else None

    @outside_modes
    def _start_backward(self, *, factor: float) -> None:
        reducing = self._reduces_now()
        self._window.begin_backward(self._micro_share(), reducing=reducing)
        self.schedule.begin_backward(reducing=reducing, factor=factor)

    def _reduces_now(self) -> bool:
        every_time = STAGES[self.config.zero_optimization.stage].gradients is not Placement.PARTIAL
        return not self._no_sync and (every_time or self.is_gradient_accumulation_boundary())

    @outside_modes
    def _end_backward(self) -> None:
        with self._reporter.phase("reduce"):
            self.schedule.end_backward()
        if self._boundary is not None:
            self._boundary.update.seal(scale_is_out=self._grad_scale is not None)

    @outside_modes
    def _foreign_backward(self) -> bool:
        """A backward that this engine did not begin enters its outputs; whether this is the first to be heard of it."""
        if self.schedule.in_backward:
            return False
        self._check_trains("loss.backward()")
        self._start_backward(factor=self._foreign_factor())
        return True

    def _foreign_factor(self) -> float:
        """What gradients of a backward that this engine did not begin are multiplied by when they are collected.

        They become what :meth:`backward` would have given: ``own factor / factor that was applied``, where the second
        is that of the engine which began it, and 1.0 for a plain ``loss.backward()``. A quotient of loss scales is a
        power of two, hence exact.
        """
        applied, by_accumulation = multiplied_by()
        if self._first_plain and (applied, by_accumulation) == PLAIN:
            self._first_plain = False
            if is_some_loss_scaled():
                self._tell_once(
                    "gradients came by a plain loss.backward(), and a torch.amp.GradScaler is in use: if it scaled "
                    "this loss, they are too large by its scale. Leave it away, and call engine.backward(loss)."
                )
        if self.scaler.scale != 1.0 and (applied, by_accumulation) == PLAIN:
            self._tell_once(
                "gradients of fp16 came without the loss scale, by a plain loss.backward() or set by hand: they count, "
                "but what is below 6e-8 on its way is lost. engine.backward(loss) multiplies the loss by the scale."
            )
        own = self._micro_share() / (self._window.unit if by_accumulation else 1) * self.scaler.scale
        return own / applied if applied else 0.0

    def _micro_share(self) -> float:
        """How much this micro-step counts, 1.0 unless the engine's own loader has just handed out a smaller batch."""
        loader = self.training_dataloader
        if loader is not None and loader.position != self._loader_position:
            self._share = loader.weight if self.config.data_loader.weighting == "samples" else 1.0
        return self._share

    @outside_modes
    def _collect_unseen(self) -> bool:
        """Collect gradients that nothing announced: of a backward through ``model.encode()``, or written by hand."""
        if self._boundary is None or not any(unit.has_uncollected() for unit in self._layout.units):
            return False
        self._start_backward(factor=self._foreign_factor())
        self._end_backward()
        return True

    def _join_reductions(self) -> None:
        """A rank without a backward still takes part in the reductions of those that had one."""
        reducing = self._reduces_now()
        self._window.join(reducing=reducing)
        self.schedule.begin_backward(reducing=reducing, factor=1.0)
        self._end_backward()

    # -- step -------------------------------------------------------------------------------------------------------

    @outside_modes
    def step(self, weight: float | None = None, *, boundary: bool | None = None, lr_kwargs: Any = None) -> None:
        """End a micro-step; at the accumulation boundary, update the weights.

        Gradients are averaged over the ranks, clipped and applied; then they are zero and the scheduler has stepped. A
        backward was divided by the configured accumulation, and several of them in one micro-step are a sum. A window
        that ends by counting is averaged over the micro-steps that it holds. Where the caller says that it ends, by
        ``boundary`` or :meth:`set_gradient_accumulation_boundary`, its gradient is the sum of what its backwards gave,
        however many calls of this method lay between.

        A batch of the engine's own loader counts for the samples in it, any other as a full one whatever it holds:
        which dimension of its tensors is the batch, and what a loss is the mean of, cannot be seen.

        Args:
            weight: of this micro-step, where the losses given to ``backward`` were **sums** over ``weight`` samples or
                tokens: the gradient is then divided by the sum of all weights. Not for losses that are means.
            boundary: whether the window ends here, whatever was counted.
            lr_kwargs: keyword arguments for the scheduler's ``step``.

        Raises:
            UsageError: without an optimizer, or if the window has seen no backward.
            DisagreementError: if ranks did not issue the same collectives, or differ in the optimizer's options or in
                the place of the engine's loader; no weight was changed. An accelerator may say so at the next step.
            CheckpointError: if the checkpoint that is due after this step could not be written; the step is done.
            SystemExit: after a SIGTERM, once the checkpoint is written, where ``checkpoint.save_on_sigterm`` is set.
        """
        end_of_window = self._check_trains("step()")
        ends = self.is_gradient_accumulation_boundary() if boundary is None else boundary
        share = self._micro_share()
        if weight is not None and share != 1.0:
            raise UsageError(
                f"step(weight=...) says that losses are sums, but this batch of the engine's loader holds {share:.3g} "
                f'of a full one and was weighted as a mean. Set "data_loader": {{"weighting": "none"}}.'
            )
        if any(unit.holds for unit in self._layout.units):
            raise UsageError("step() was called inside a forward or inside gathered_parameters(). Call it after them.")
        window = self._window
        if not self._collect_unseen() and not window.backwards and self.comm.world_size > 1:
            self._join_reductions()
        if ends and not window.backwards and self.comm.world_size == 1:
            raise no_backward()
        if ends and self._trained != self._requires_grad():
            raise UsageError(
                "requires_grad of a parameter changed inside an accumulation window. Change it right after a step, "
                "before the next forward."
            )
        if (rows := self._short.take()) is not None and weight is None:
            self._tell_once(
                f"a batch of {rows} samples counts as one of {self._short.full} like those before: only the engine's "
                f"own loader knows how much a batch holds. Give initialize the dataset as training_data, or make "
                f"losses sums and call engine.step(weight=samples)."
            )
        window.add_step(share, None if weight is None else float(weight), self._samples_seen())
        self.progress.micro_steps += 1
        self._note_loader()
        if not ends:
            self.progress.applied = False
            return
        if boundary is not None or window.boundary is not None:
            self._end_as_sum()
        else:
            window.end()
        with self._reporter.phase("step"):
            self._end_window(end_of_window, lr_kwargs or {})
        self.window_start.mark(self._loader_position)
        self.checkpoints.after_step(leave=self.progress.leaving)

    def _end_as_sum(self) -> None:
        """The caller said that the window ends: its gradient is a sum, and calls of ``step`` count for nothing."""
        uncounted = self._window.end_as_sum()
        self.progress.micro_steps += uncounted
        if self.training_dataloader is None:
            self._window.samples += uncounted * self.config.train_micro_batch_size_per_gpu

    def _end_window(self, boundary: Boundary, lr_kwargs: dict[str, Any]) -> None:
        window, loss = self._window, self._window.mean_loss()
        before = (lambda: self._call(self._before)) if self._before else None
        after = (lambda: self._call(self._after)) if self._after else None
        try:
            self._settle(ending=True)
            self.checkpoints.before_step()
            rates, scale = self._rates(), self._reported_scale()
            self._hooks.unpin()  # its graphs are of weights that now change
            host = boundary.end(
                window,
                leaving=self.checkpoints.leaving.asked,
                at_once=self.lr_scheduler is not None and not lr.can_undo(self.lr_scheduler),
                before=before,
                after=after,
            )
        finally:
            self._drop_gradients()
        self.progress.global_steps += 1
        self._ended = self._reporter.ended(self.global_steps, loss=loss, lr=rates, loss_scale=scale)
        if host is None or not host.skipped:
            self._note_new_weights()
            if self.lr_scheduler is not None:
                self._step_scheduler(lr_kwargs, certain=host is not None)
        if host is not None:
            self._settle()

    def _note_new_weights(self) -> None:
        torch.autograd.graph.increment_version(self._trainable)
        for unit in self._layout.units:
            unit.note_versions()
            for bucket in unit.buckets:
                if (standing := bucket.edits.standing) is not None:
                    self._tell_once(
                        f"frozen parameter {standing!r} is edited again and again, and most of its elements "
                        f"stay what they were: {bucket.plan.dtype} rounds away what a moving average adds to them. "
                        f"Keep its modules in fp32 (data_types.module_dtypes).",
                        key="standing",
                    )

    def _reported_scale(self) -> float | None:
        return self.scaler.scale if self.precision.compute is torch.float16 else None

    def _rates(self) -> list[float | Tensor]:
        """What :meth:`get_lr` gives, but copies of those that lie on a device: reading them would wait for it."""
        rates = [] if self.optimizer is None else [group["lr"] for group in self.optimizer.param_groups]
        return [
            rate.detach().clone() if isinstance(rate, Tensor) and rate.device.type != "cpu" else float(rate)
            for rate in rates
        ]

    def _step_scheduler(self, lr_kwargs: dict[str, Any], *, certain: bool) -> None:
        """``certain``: the update is known to be applied. Else it is assumed, and the step can be taken back."""
        scheduler, optimizer = self.lr_scheduler, self.optimizer
        if self._scheduled not in (None, getattr(scheduler, "last_epoch", None)):
            self._tell_once(
                "the scheduler was stepped by engine.step() and elsewhere: rates change twice as often as they should. "
                "Remove scheduler.step() from the loop, or set engine.lr_scheduler = None to step it yourself."
            )
        if certain or optimizer is None:
            scheduler.step(**lr_kwargs)
        else:
            undo = lr.step(scheduler, optimizer, lr_kwargs)
            if self._ended is not None:
                self._unschedule = undo
            elif not self.progress.applied:  # the schedule has asked the engine something
                undo()
        self._scheduled = getattr(scheduler, "last_epoch", None)

    def _resolve(self) -> None:
        """Learn what became of the last step, where nobody has yet, and tell it. A rank may do this alone."""
        host = None if self._boundary is None else self._boundary.read()
        ended, undo = self._ended, self._unschedule
        if host is None or ended is None:
            return
        self._ended = self._unschedule = None
        if host.skipped and undo is not None and undo():
            self._scheduled = getattr(self.lr_scheduler, "last_epoch", None)
        if host.refused:
            self.progress.global_steps -= 1
        else:
            self._reporter.tell(ended, host, loss_scale=self._reported_scale())

    def _settle(self, *, ending: bool = False) -> None:
        """The same, and its consequences, on every rank at the same place."""
        self._resolve()
        if self._boundary is not None:
            self._boundary.act_on_verdict(ending=ending)

    def _drop_gradients(self) -> None:
        self.schedule.finish_reductions()
        for unit in self._layout.units:
            unit.drop_grads()
        if self._boundary is not None:
            self._boundary.update.unseal()
        self._window.restart()

    def _samples_seen(self) -> int:
        """Samples of this micro-step: what the engine's own loader has handed out for it, or a full micro-batch."""
        if self._handed is not None:
            return self._handed
        return self.config.train_micro_batch_size_per_gpu

    def _note_loader(self) -> None:
        if self.training_dataloader is not None:
            self._loader_position = self.training_dataloader.position
        self._share, self._handed = 1.0, None

    def _call(self, hooks: list[StepHook]) -> None:
        if self.optimizer is not None:
            fragments = list(local_fragments(self._layout.runs, self.optimizer))
            for hook in list(hooks):
                hook(fragments)

    # -- accumulation -----------------------------------------------------------------------------------------------

    @outside_modes
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard what this window has accumulated and what is in flight. Where in the window we are stays."""
        steps = self._window.steps
        self._drop_gradients()
        self._window.restart(steps=steps)
        drop_grads(list(self.module.parameters()))

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-step is the last of its window."""
        return self._window.at_boundary

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Say whether the current micro-step and those after it end a window; ``None`` goes back to counting."""
        self._window.boundary = is_boundary

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, backward does not reduce: gradients are added up on this rank and reduced later.

        Works at every stage. At stages 2 and 3 it costs what these stages save: whole gradients on every rank, in the
        accumulation dtype (4 bytes for each trainable parameter), until the next reduction.
        """
        before, self._no_sync = self._no_sync, True
        try:
            yield
        finally:
            self._no_sync = before

    # -- weights ----------------------------------------------------------------------------------------------------

    @outside_modes
    def full_state_dict(self, dtype: torch.dtype | None = None, rank0_only: bool = False) -> dict[str, Any]:
        """The whole model's ``state_dict()``, on CPU: weights, persistent buffers, extra state. Collective, any stage.

        Args:
            dtype: of floating weights; ``None`` leaves that of the masters, fp32 where there are any.
            rank0_only: other ranks take part and get an empty dict.
        """
        self._check_alive("full_state_dict()")
        self._contents.check()
        wanted = not rank0_only or self.comm.rank == 0
        return full_state_dict(self.module, self._layout, self.comm, dtype, wanted=wanted)

    def gathered_parameters(
        self, params: Iterable[nn.Parameter | str] | nn.Module | None = None, write: bool = False
    ) -> AbstractContextManager[None]:
        """Within it, sharded parameters are whole and can be read; with ``write`` they can be changed. Collective.

        What was changed is taken over at the end, everywhere alike: rank 0's values win.

        Args:
            params: parameters, their names, or a module, instead of all. What shares a unit with them comes along.
            write: whether changes shall be kept. Changes without it raise.

        Raises:
            UsageError: for an unknown parameter, or a change without ``write``.
        """
        return gathered(units_of(self._layout, params), self._hooks, write=write)

    def before_step(self, hook: StepHook) -> Handle:
        """Call ``hook(fragments)`` before every update, with averaged, unscaled, unclipped gradients.

        ``fragments`` are this rank's pieces of parameters (:class:`shardline.sharding.fragments.StateFragment`):
        weights, gradients and optimizer state, all views that may be changed in place. Clipping follows, on what is
        there then.
        """
        self._before.append(hook)
        return Handle(self._before, hook)

    def after_step(self, hook: StepHook) -> Handle:
        """Call ``hook(fragments)`` after every applied update; see :meth:`before_step`. Changed weights are kept."""
        self._after.append(hook)
        return Handle(self._after, hook)

    def _add_group(self, add: Callable[[dict[str, Any]], None], group: dict[str, Any]) -> None:
        """``optimizer.add_param_group`` with parameters of the model: they join at the next forward."""
        self._contents.check()
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        joining = group_parameters(self.module, [{"params": params}])
        taken = sorted(set(joining) & set(self._groups))
        if taken:
            raise UsageError(f"parameter {taken[0]!r} is in a param group of this optimizer already.")
        add({**group, "params": params})
        index = len(self.optimizer.param_groups) - 1 if self.optimizer is not None else 0
        self._groups.update(dict.fromkeys(joining, index))
        self._trained = {}

    def _regroup(self, ages: Mapping[str, int] | None = None) -> None:
        """Parameters were frozen, unfrozen, or added to the optimizer: plan anew, keeping all state."""
        if self.optimizer is None:
            return
        self._settle()
        for unit in self._layout.units:
            unit.adopt()
        self.schedule.release_all()
        self._hooks.remove()
        self._layout = regroup(
            self._layout,
            self.config,
            self.precision,
            self.comm,
            self.optimizer,
            self._groups,
            self._parked,
            self._touched,
            whole=self._whole,
            ages=ages,
        )
        self._trained = self._requires_grad()
        self._arrange()

    def _is_stepping(self) -> bool:
        return self._boundary is not None and self._boundary.update.applying

    def _touched(self, unit: Unit) -> bool:
        return self._hooks.touch(unit)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    @outside_modes
    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        *,
        async_save: bool | None = None,
    ) -> bool:
        """Save everything that a resume needs to ``save_dir/tag``. Collective: every rank calls it alike.

        Inside an accumulation window it holds the start of the window, and a resume replays it.

        Args:
            save_dir: a directory that all ranks share.
            tag: name of the checkpoint; ``global_step<n>`` if left out. One of the same name is replaced.
            client_state: the user's own values (plain ones and tensors), given back by :meth:`load_checkpoint`;
                rank 0's are kept.
            save_latest: whether a load without a tag may take it.
            exclude_frozen_parameters: leave out the weights of frozen parameters.
            async_save: go on training while it is written; the configuration's ``checkpoint.async`` if left out. An
                error is raised by the next call that saves, loads or destroys.

        Returns:
            True.

        Raises:
            CheckpointError: on every rank, if any could not write. Nothing has changed then, and training can go on.
            DisagreementError: if ranks gave different tags.
        """
        background = self.config.checkpoint.async_save if async_save is None else async_save
        return self.checkpoints.save(
            save_dir,
            tag,
            self.client_state if client_state is None else client_state,
            latest=save_latest,
            frozen=not exclude_frozen_parameters,
            background=background,
        )

    @outside_modes
    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: None = None,
        *,
        load_data_position: bool = True,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load a checkpoint that any stage, precision and number of ranks has saved. Collective. Runs no code from it.

        Args:
            load_dir: the directory given to :meth:`save_checkpoint`.
            tag: which one; the newest whole one if left out, and a notice says why not a later one.
            load_module_strict: names of parameters and buffers must be the same. If false, each that only one side has
                is named in a notice, and the rest is loaded.
            load_optimizer_states: and its param groups' options.
            load_lr_scheduler_states: the schedule's position.
            load_module_only: weights and buffers only; no counters, random states or position of the loader either.
            custom_load_fn: not supported.
            load_data_position: the position of the engine's loader.

        Returns:
            ``(path, client_state)``, or ``(None, None)`` where there is no checkpoint.

        Raises:
            CheckpointError: if the one that ``tag`` names, or every one that there is, is damaged or does not fit.
            DataError: if the loader's position does not fit this dataset; nothing was loaded then.
        """
        if custom_load_fn is not None:
            raise UsageError("custom_load_fn is not supported. Load weights inside gathered_parameters(write=True).")
        path, state = self.checkpoints.load(
            load_dir,
            None if tag is None else str(tag),
            strict=load_module_strict,
            optimizer=load_optimizer_states,
            scheduler=load_lr_scheduler_states,
            position=load_data_position,
            weights_only=load_module_only,
        )
        self.client_state = self.client_state if state is None else state
        return path, state

    @outside_modes
    def export(
        self,
        save_dir: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        exclude_frozen_parameters: bool = False,
        max_shard_bytes: int = 5_000_000_000,
    ) -> list[str]:
        """Write the whole model in Hugging Face's layout: safetensors files and their index. Collective.

        One unit at a time is whole in memory. Tied parameters are written once.

        Args:
            save_dir: a directory of rank 0.
            dtype: of floating weights; ``None`` leaves that of the masters, fp32 where there are any.
            exclude_frozen_parameters: leave out frozen parameters.
            max_shard_bytes: a file holds no more, unless a single tensor is larger.

        Returns:
            The files that were written.

        Raises:
            CheckpointError: on every rank, if rank 0 could not write.
        """
        return self.checkpoints.export(
            save_dir, dtype, frozen=not exclude_frozen_parameters, shard_bytes=max_shard_bytes
        )

    @outside_modes
    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "model.safetensors",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the whole model in its compute dtype, as :meth:`export` does: safetensors whatever the name says."""
        stem = os.path.splitext(save_filename)[0]
        stem = "model" if stem == "pytorch_model" else stem  # the name that goes with safetensors
        self.checkpoints.export(save_dir, self.precision.compute, frozen=not exclude_frozen_parameters, stem=stem)
        return True

    save_fp16_model = save_16bit_model

    def checkpoint_parts(self) -> Parts:
        """This rank's tensors as a checkpoint sees them."""
        self._contents.check()
        self._settle()
        for unit in self._layout.units:
            unit.adopt()
        layout = self._layout
        return Parts(self.module, layout.units, layout.runs, self.optimizer, self._parked, self._groups, self.comm)

    def checkpoint_counters(self) -> dict[str, int]:
        """Counts at the start of the current window."""
        self._resolve()
        progress = self.progress
        return {
            "global_steps": progress.global_steps,
            "micro_steps": progress.micro_steps - self._window.steps,
            "global_samples": progress.global_samples,
            "skipped_steps": progress.skipped_steps,
        }

    def in_window(self) -> bool:
        """Whether the current window has begun."""
        return self._window.touched

    def lay_out_by_age(self, ages: Mapping[str, int]) -> None:
        """Lay the model out anew, so that only parameters whose state has seen as many steps share a run."""
        if self.optimizer is not None:
            self.optimizer.state.clear()
        self._parked.clear()
        self._regroup(ages)

    def go_on_from(self, counters: Mapping[str, int] | None) -> None:
        """Begin a new window, with ``counters`` where given."""
        self._drop_gradients()
        if self._boundary is not None:
            self._boundary.forget()
        for name, count in (counters or {}).items():
            setattr(self.progress, name, count)
        self._scheduled = None
        self._note_loader()
        self.window_start.mark(self._loader_position)

    # -- the rest of the surface ------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module" or name.startswith("_"):
                raise
            found = getattr(self.module, name)
        return self._method(found) if isinstance(found, MethodType) and found.__self__ is self.module else found

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise self._no_copy("copied")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self._no_copy("pickled")

    def _no_copy(self, done: str) -> UsageError:
        return UsageError(
            f"an engine cannot be {done}: it holds the process groups of its ranks and their parts of the model. Copy "
            f"or save engine.module inside engine.gathered_parameters(), take engine.full_state_dict(), or call "
            f"save_checkpoint() to go on later."
        )

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> Any:
        """Read by DistributedDataParallel alone, of a module that it is about to wrap."""
        raise UsageError(
            "an engine was given to DistributedDataParallel (accelerator.prepare(engine) does that). The engine "
            "averages gradients itself: use it as it is, and give prepare() the data loaders alone."
        )

    @property
    def global_steps(self) -> int:
        """Optimizer steps so far, skipped ones included."""
        return self.progress.global_steps

    @property
    def micro_steps(self) -> int:
        """Calls of :meth:`step` so far."""
        return self.progress.micro_steps

    @property
    @outside_modes
    def global_samples(self) -> int:
        """Samples of all ranks together that the steps have seen."""
        self._resolve()
        return self.progress.global_samples

    @property
    @outside_modes
    def skipped_steps(self) -> int:
        """Steps whose gradients were not finite, so that nothing was changed."""
        self._resolve()
        return self.progress.skipped_steps

    @outside_modes
    def was_step_applied(self) -> bool:
        """Whether the last step changed the weights."""
        self._resolve()
        return self.progress.applied

    def get_global_grad_norm(self) -> float | Tensor | None:
        """L2 norm of the last step's averaged gradients before clipping; a 0-dim tensor where reading it would wait."""
        return self.progress.norm

    @outside_modes
    def get_lr(self) -> list[float]:
        """The learning rate of each param group, at which the next update runs."""
        self._resolve()
        return [] if self.optimizer is None else [float(group["lr"]) for group in self.optimizer.param_groups]

    @property
    def local_rank(self) -> int:
        return self.topology.local_rank

    @property
    def global_rank(self) -> int:
        """The number of this process among those that train this model: the job's, or those of ``mesh=``."""
        return self.comm.rank

    @property
    def world_size(self) -> int:
        """How many processes train this model; ``engine.topology`` has the numbers of the whole job."""
        return self.comm.world_size

    @property
    def device(self) -> torch.device:
        return self.topology.device

    def train_batch_size(self) -> int:
        return self.config.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.config.train_micro_batch_size_per_gpu

    def gradient_accumulation_steps(self) -> int:
        return self._window.unit

    def zero_optimization_stage(self) -> int:
        return self.config.zero_optimization.stage

    def bfloat16_enabled(self) -> bool:
        return self.config.bf16.enabled

    def fp16_enabled(self) -> bool:
        return self.config.fp16.enabled

    @property
    def loss_scale(self) -> float:
        """The current loss scale; 1.0 without fp16."""
        return self.scaler.scale

    @outside_modes
    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the model block by block; the engine's hooks stay outside of what is compiled.

        Modules without blocks are compiled unit by unit. What a backend fuses or decomposes may round differently.

        Args:
            *args: those of ``torch.compile`` beside the function.
            **kwargs: the same: ``backend``, ``mode``, ``dynamic``...

        Raises:
            UsageError: in the middle of a forward, a second time, or for a model in which nothing can be compiled.
        """
        self._check_alive("compile()")
        if self._compiled or any(unit.holds for unit in self._layout.units):
            when = "a second time" if self._compiled else "inside a forward or inside gathered_parameters()"
            raise UsageError(f"compile() was called {when}. Call it once, after shardline.initialize.")
        units = self._layout.units
        self._compiled = True
        self._undo.append(compile_blocks(self.module, [unit.plan for unit in units], args, kwargs))
        self._hooks.remove()
        self._hooks = self._make_hooks()

    @outside_modes
    def destroy(self) -> None:
        """Take the engine off the model: hooks are gone and parameters are ordinary again, whole on every rank.

        Collective at stage 3. The engine cannot be used afterwards.
        """
        if self._destroyed:
            return
        window = self._window
        if window.backwards:
            what = "a backward" if window.backwards == 1 else f"{window.backwards} backwards"
            self.events.emit(Notice(f"destroy() discards the gradients of {what}, which no step has applied"))
        self._drop_gradients()
        self._resolve()
        if self._boundary is not None and self._boundary.refused:
            why = "ranks did not do the same in it, or none had a backward"
            self.events.emit(Notice(f"step {self.global_steps + 1} was not applied: {why}"))
        self.checkpoints.close()
        self._hooks.remove()
        while self._undo:
            self._undo.pop()()
        for unit in self._layout.units:
            unit.wait_for_unshard()
            unit.detach_params()
        self._destroyed = True
        _ENGINES.pop(id(self), None)
        self.comm.close()
        if self.training_dataloader is not None:
            self.training_dataloader.close()
            self.training_dataloader.on_batch = None
        # These refer back to the engine. Without them memory of the device is free with the last reference to the
        # engine, not when the garbage collector comes to it.
        del self._layout, self._hooks, self.schedule, self.checkpoints, self._alike, self._trainable
        self._boundary = None

    def _tell_once(self, message: str, key: str | None = None) -> None:
        if (key or message) not in self._told:
            self._told.add(key or message)
            self.events.emit(Notice(message))

    def _check_alive(self, what: str) -> None:
        if self._destroyed:
            raise UsageError(f"{what} was called after destroy(). Make a new engine with shardline.initialize.")

    def _check_trains(self, what: str) -> Boundary:
        self._check_alive(what)
        if self._boundary is None:
            raise UsageError(
                f"{what} needs an optimizer, and this engine has none. Give initialize an optimizer, or an "
                f'"optimizer" section in the configuration.'
            )
        return self._boundary
