"""The engine that people call: forward, backward and step of one model over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardline.checkpoint.engine.checkpointer import Checkpointer
from shardline.checkpoint.engine.window import WindowStart
from shardline.comm import Comm
from shardline.config import Config
from shardline.data import Loader
from shardline.data.place import LoaderPlace
from shardline.engine.backwards import Backwards
from shardline.engine.batch_tracker import BatchTracker
from shardline.engine.calls import Calls
from shardline.engine.collective import collective
from shardline.engine.getters import Getters
from shardline.engine.loss_checks import LossChecks
from shardline.engine.nonfinite import NonFiniteSearch
from shardline.engine.notices import Notices
from shardline.engine.observing import Observing
from shardline.engine.optimizer_state import OptimizerState
from shardline.engine.outcome import Outcome
from shardline.engine.report import Reporter
from shardline.engine.saving import Saving
from shardline.engine.serving import Serving
from shardline.engine.state import EngineState
from shardline.engine.trainables import Trainables
from shardline.engine.weights import full_state_dict, gathered, note_engine, units_of
from shardline.engine.window_grads import WindowGrads
from shardline.engine.wrapper import Wrapper
from shardline.errors import UsageError
from shardline.events import Events, Notice
from shardline.features.compiling import compile_blocks
from shardline.observe.sinks import Sinks
from shardline.optim import lr
from shardline.optim.options import OptimizerOptions
from shardline.plan.placement import STAGES, Placement
from shardline.runtime.modes import outside_modes
from shardline.runtime.topology import Topology
from shardline.sharding.boundary import Boundary, no_backward
from shardline.sharding.build import Layout
from shardline.sharding.consistency import ConsistencyCheck
from shardline.sharding.fragments import ParamState, StateFragment, local_fragments
from shardline.sharding.gradient import drop_grads
from shardline.sharding.hooks import Hooks, watch_outputs
from shardline.sharding.precision import LossScaler, Precision
from shardline.sharding.window import Progress, Window

__all__ = ["Engine", "StepHook"]

StepHook = Callable[[list[StateFragment]], None]


@dataclass
class Handle:
    """Removes a registered function."""

    hooks: list[StepHook]
    hook: StepHook

    def remove(self) -> None:
        if self.hook in self.hooks:
            self.hooks.remove(self.hook)


class Engine(Wrapper, Getters, Saving, Observing, Serving):
    """Runs forward, backward and step of one model over all ranks. Made by :func:`shardline.initialize`.

    It is an ``nn.Module`` whose child ``module`` is the user's model; attributes that it does not have are the model's.

    Attributes:
        module: the user's model; its parameters are views of the engine's buffers.
        optimizer: a ``torch.optim.Optimizer`` over this rank's runs, or ``None``.
        lr_scheduler: stepped after every applied step (or undone after a skipped one); ``None`` to step it oneself.
        training_dataloader: the loader of ``training_data``, or ``None``.
        config (Config): the typed configuration.
        topology (Topology): rank, world size, device of this process in the whole job.
        events: the stream of what happens; ``events.subscribe(fn)`` to listen.
        sinks: those that the configuration asks for, on rank 0.
        trainables: what is trained, and the layout, schedule and hooks that were made for it.
        progress: how many steps and samples there were, and what the last step did.
    """

    _window_kind: type[Window] = Window
    _loss_checks_kind: type[LossChecks] = LossChecks

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
    ) -> None:
        super().__init__()
        self.module, self.optimizer = model, optimizer
        self.lr_scheduler: Any = None
        self.training_dataloader: Loader | None = None
        self.config, self.topology, self.precision, self.comm = config, topology, precision, comm
        self.events = Events()
        self.scaler = self._make_scaler(config)
        self.progress = Progress()
        self.client_state, self.sinks = {}, Sinks({}, config)
        self.window_start = WindowStart(model, comm.device)
        self._before_step: list[StepHook] = []
        self._after_step: list[StepHook] = []
        self._compiled = False
        notices = Notices(self.events)
        self._loss_checks = self._loss_checks_kind(notices)
        self._reporter = Reporter(self.events, comm, config)
        self._window = self._window_kind(config.gradient_accumulation_steps)
        self._batches = batches = BatchTracker(config, self._window, self.window_start, notices)
        self._calls = Calls(model, precision, comm.device, notices)
        check = ConsistencyCheck([OptimizerOptions(lambda: optimizer), LoaderPlace(lambda: batches.loader)])
        make_boundary = partial(Boundary, scaler=self.scaler, config=config, progress=self.progress, consistency=check)
        self.trainables = Trainables(
            model, layout, optimizer, groups, config, precision, comm,
            on_forward=self._begin_forward,
            on_call=self._calls.see if self._calls.watches else None,
            make_boundary=make_boundary,
        )  # fmt: skip
        every_time = STAGES[config.zero_optimization.stage].gradients is not Placement.PARTIAL
        self._backwards = Backwards(
            self._window, self.trainables, self._batches, self._loss_checks, self.scaler, self._reporter,
            every_time=every_time,
        )  # fmt: skip
        self._outcome = Outcome(
            self.trainables, optimizer, self.progress, self.scaler, precision, self._reporter, notices,
            config.max_skipped_steps,
        )  # fmt: skip
        self._grads = WindowGrads(self.trainables, self._window, comm, self.scaler, self._backwards.complete)
        self.checkpoints = Checkpointer(
            EngineState(self, self.trainables, self._window, self._batches, self._backwards, self._outcome)
        )
        self._on_destroy = [note_engine(self)]  # and what is done to model and optimizer besides the hooks
        guarded = self.trainables.guard_optimizer(
            zero_grad=self.zero_grad,
            state_dict=self._optimizer_state_dict,
            load_state_dict=self._load_optimizer_state_dict,
        )
        self.on_destroy(guarded)
        self._search = self._make_search()

    def attach_loader(self, loader: Loader) -> None:
        """Take ``loader`` as the engine's own: a batch counts for the samples in it, and checkpoints hold its position.

        :meth:`destroy` closes it.
        """
        self.training_dataloader = loader
        self._batches.attach(loader)
        loader.on_error = self.comm.give_up

    def on_destroy(self, undo: Callable[[], None]) -> None:
        """Have :meth:`destroy` call ``undo``, the last one first."""
        self._on_destroy.append(undo)

    def _make_search(self) -> NonFiniteSearch | None:
        if not self.config.debug.find_nonfinite:
            return None
        search = NonFiniteSearch(self.module, self.comm, self.events)
        self.on_destroy(search.close)
        return search

    def _make_scaler(self, config: Config) -> LossScaler:
        return LossScaler.from_config(config)

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on inputs whose floating tensors are cast to the compute dtype. Returns what it returns."""
        trainables = self.trainables
        trainables.check_open("forward")
        self._batches.note_inputs(args, kwargs)
        args, kwargs = self._calls.cast(args, kwargs)
        try:
            with self._reporter.phase("forward"), self._calls.through_engine():
                output = self.module(*args, **kwargs)
            output = self._calls.output(output)
        except BaseException as error:
            trainables.hooks.unwind()
            trainables.hooks.explain(error)
            self.precision.explain(error, self.module)
            raise
        if torch.is_grad_enabled():
            self._watch(output)
        return output

    @outside_modes
    def _watch(self, output: Any) -> None:
        """Hook ``output``, so that a plain ``loss.backward()`` through it is noticed."""
        if self.trainables.params:
            watch_outputs(output, self._backwards.enter_foreign, self._backwards.end, self.trainables.params)

    @outside_modes
    def _begin_forward(self) -> Hooks:
        """The model's forward begins outside of any backward: check what the user has changed since the last one.

        Returns the hooks of the layout that serves this forward.
        """
        with_grad, trainables = torch.is_grad_enabled(), self.trainables
        if with_grad:
            self._window.begin_forward()
            if self.window_start.random is None:
                self.window_start.mark(self._batches.position)
        if not self._window.backwards:
            trainables.check_before_forward(forget_edits=with_grad)
            if with_grad and trainables.have_changed():  # what is frozen for an evaluation needs no other layout
                self._outcome.act_on_verdict()
                trainables.lay_out_again()
        return trainables.hooks

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
            UsageError: if ``loss`` is not a scalar with a gradient, or there is no optimizer.
        """
        self.trainables.check_trains("backward()")
        _check_loss(loss)
        divisor = self._window.accumulation if scale_wrt_gas else 1
        factor = self._batches.share() / divisor * self.scaler.scale
        grad_scale = self._loss_checks.scale_of(loss, divisor)
        with self._backwards.running(factor, by_accumulation=scale_wrt_gas):
            scaled = loss.float() if loss.dtype is torch.float16 else loss
            root = torch.full_like(scaled, factor)
            scaled.backward(root if grad_scale is None else root / grad_scale, retain_graph=retain_graph)
        self._backwards.end()
        return self._report(loss, divisor, grad_scale)

    @outside_modes
    def _report(self, loss: Tensor, divisor: float, grad_scale: Tensor | None) -> Tensor:
        reported = loss.detach() / divisor
        if grad_scale is not None:
            reported = reported / grad_scale
        self._window.add_loss(reported, self._batches.share())
        return reported

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
        the engine cannot know which dimension of its tensors is the batch, nor what a loss is the mean of.

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
            SystemExit: with code 75 after a SIGTERM or SIGUSR1, once the checkpoint is written, where
                ``checkpoint.save_on_sigterm`` is set.
        """
        window, trainables = self._window, self.trainables
        end_of_window = trainables.check_trains("step()")
        ends = window.at_boundary if boundary is None else boundary
        self._batches.check_weight(weight)
        if trainables.in_use:
            raise UsageError("step() was called inside a forward or inside gathered_parameters(). Call it after them.")
        if not self._backwards.collect_unseen() and not window.backwards and self.comm.data.size > 1:
            self._backwards.join()
        if ends and not window.backwards and self.comm.data.size == 1:
            raise no_backward()
        if ends and trainables.have_changed():
            raise UsageError(
                "requires_grad of a parameter changed inside an accumulation window. Change it right after a step, "
                "before the next forward."
            )
        self._count_micro_step(weight)
        if not ends:
            self.progress.applied = False
            self.comm.watch.status.count(self.progress.global_steps, window.steps)
            return
        if boundary is None and window.forced_boundary is None:
            window.end()
        else:
            self._end_as_sum()
        self._end_window(end_of_window, lr_kwargs or {})
        self.comm.watch.status.count(self.progress.global_steps, 0)
        self.window_start.begin(self._batches.position)
        self.checkpoints.after_step(leave=self.progress.exit_requested)

    def _count_micro_step(self, weight: float | None) -> None:
        batches = self._batches
        if weight is None:
            batches.warn_of_short_batch()
        self._window.add_step(batches.share(), None if weight is None else float(weight), batches.samples)
        self.progress.micro_steps += 1
        batches.end_micro_step()

    def _end_as_sum(self) -> None:
        """The user has ended the window: its gradient is a sum, whatever number of calls of ``step`` it holds."""
        uncounted = self._window.end_as_sum()
        self.progress.micro_steps += uncounted
        if self.training_dataloader is None:
            self._window.samples += uncounted * self.config.train_micro_batch_size_per_gpu

    def _end_window(self, boundary: Boundary, lr_kwargs: dict[str, Any]) -> None:
        scheduler = self.lr_scheduler
        with self._reporter.phase("step"):
            try:
                self._outcome.act_on_verdict(ending=True)
                self.trainables.bring_states()
                self.checkpoints.before_step()
                before = self._outcome.before_step()
                self.trainables.hooks.unpin()  # its graphs are of weights that now change
                host = boundary.end(
                    self._window,
                    exit_requested=self.checkpoints.exit_requested,
                    at_once=self._search is not None or (scheduler is not None and not lr.can_undo(scheduler)),
                    before=partial(self._call, self._before_step) if self._before_step else None,
                    after=partial(self._call, self._after_step) if self._after_step else None,
                )
            finally:
                self._backwards.discard()
        self._outcome.after_step(before, host, self.lr_scheduler, lr_kwargs)
        if self._search is not None and host is not None:
            self._search.end_window(host, self.scaler, self.global_steps, self._backwards, self._calls)

    def _call(self, hooks: list[StepHook]) -> None:
        if self.optimizer is not None:
            fragments = list(local_fragments(self.trainables.layout.runs, self.optimizer))
            for hook in list(hooks):
                hook(fragments)

    # -- accumulation -----------------------------------------------------------------------------------------------

    @outside_modes
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard what this window has accumulated and what is in flight. The count of micro-steps stays."""
        self._backwards.discard(steps=self._window.steps)
        drop_grads(list(self.module.parameters()))

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-step is the last of its window."""
        return self._window.at_boundary

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Set whether the current micro-step and those after it end a window; ``None`` counts them again."""
        self._window.forced_boundary = is_boundary

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, backward does not reduce: gradients are added up on this rank and reduced later.

        Works at every stage. At stages 2 and 3 it costs what these stages save: whole gradients on every rank, in the
        accumulation dtype (4 bytes for each trainable parameter), until the next reduction.
        """
        before, self._backwards.no_sync = self._backwards.no_sync, True
        try:
            yield
        finally:
            self._backwards.no_sync = before

    # -- weights ----------------------------------------------------------------------------------------------------

    @outside_modes
    @collective
    def full_state_dict(self, dtype: torch.dtype | None = None, rank0_only: bool = False) -> dict[str, Any]:
        """The whole model's ``state_dict()``, on CPU: weights, persistent buffers, extra state. Collective, any stage.

        Args:
            dtype: of floating weights; ``None`` leaves that of the masters, fp32 where there are any.
            rank0_only: other ranks take part and get an empty dict.
        """
        self.trainables.check_open("full_state_dict()")
        self.trainables.check_parameters()
        wanted = not rank0_only or self.comm.data.rank == 0
        return full_state_dict(self.module, self.trainables.layout, self.comm, dtype, wanted=wanted)

    @outside_modes
    @collective
    def full_optimizer_state_dict(self, rank0_only: bool = False) -> dict[str, Any]:
        """The optimizer's ``state_dict()`` in torch's own form, on CPU, at any stage. Collective.

        Tensors are whole and parameters are numbered in the order in which the optimizer was given them, so a plain
        optimizer over the same parameters loads it.

        Args:
            rank0_only: other ranks take part and get an empty dict.

        Raises:
            OptimizerError: on every rank, for state whose shape is not its parameter's (Adafactor's), if sharded.
        """
        self.trainables.check_trains("full_optimizer_state_dict()")
        self._outcome.act_on_verdict()
        return self._optimizer_state().full(wanted=not rank0_only or self.comm.data.rank == 0)

    def _optimizer_state(self) -> OptimizerState:
        if self.optimizer is None:
            raise AssertionError("an engine without an optimizer has no state of one")
        trained = self.trainables
        return OptimizerState(trained.layout, self.optimizer, trained.groups, trained.frozen_states, self.comm)

    @outside_modes
    def _optimizer_state_dict(self) -> dict[str, Any]:
        """``optimizer.state_dict()``, which a rank may call alone."""
        self._outcome.read()
        return self._optimizer_state().state_dict()

    @outside_modes
    def _load_optimizer_state_dict(self, plain: Mapping[str, Any]) -> None:
        """``optimizer.load_state_dict(plain)``: torch's form with whole tensors. Collective."""
        states, options = self._optimizer_state().read(plain)
        self._load_optimizer_states(states, options)

    def _load_optimizer_states(
        self, states: dict[str, ParamState], options: list[dict[str, Any]] | None = None
    ) -> None:
        if self._window.backwards:
            raise UsageError(
                "the optimizer's state was loaded between a backward and its step. Load it after the step."
            )
        self.comm.messages.agree({f"the loaded state of {name!r}": state.steps for name, state in states.items()})
        self._outcome.act_on_verdict()
        self.trainables.bring_states()
        if self.optimizer is not None and options is not None:
            for group, loaded in zip(self.optimizer.param_groups, options, strict=True):
                group.update(loaded)
        if (steps := self._optimizer_state().steps_to_lay_out(states)) is not None:
            self.trainables.lay_out_by_state_steps(steps)
        self._optimizer_state().put(states)

    def gathered_parameters(
        self, params: Iterable[nn.Parameter | str] | nn.Module | None = None, write: bool = False
    ) -> AbstractContextManager[None]:
        """Within it, sharded parameters are whole and can be read; with ``write`` they can be changed. Collective.

        What was changed is taken over at the end, everywhere alike: rank 0's values win.

        Args:
            params: parameters, their names, or a module, instead of all. What shares a unit with them comes along.
            write: whether changes are kept. Changes without it raise.

        Raises:
            UsageError: for an unknown parameter, or a change without ``write``.
        """
        units = units_of(self.trainables.layout, params)
        return gathered(units, self.trainables.hooks, self.comm.watch.status, write=write)

    def before_step(self, hook: StepHook) -> Handle:
        """Call ``hook(fragments)`` before every update, with averaged, unscaled, unclipped gradients.

        ``fragments`` are this rank's pieces of parameters (:class:`shardline.sharding.fragments.StateFragment`):
        weights, gradients and optimizer state, all views that may be changed in place. Clipping follows, on what is
        there then.
        """
        self._before_step.append(hook)
        return Handle(self._before_step, hook)

    def after_step(self, hook: StepHook) -> Handle:
        """Call ``hook(fragments)`` after every applied update; see :meth:`before_step`. Changed weights are kept."""
        self._after_step.append(hook)
        return Handle(self._after_step, hook)

    # -- the whole engine -------------------------------------------------------------------------------------------

    @outside_modes
    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the model block by block; the engine's hooks stay outside of what is compiled.

        Modules without blocks are compiled unit by unit. What a backend fuses or decomposes may round differently.

        Args:
            *args: those of ``torch.compile`` except the function.
            **kwargs: the same: ``backend``, ``mode``, ``dynamic``...

        Raises:
            UsageError: in the middle of a forward, a second time, or for a model in which nothing can be compiled.
        """
        trainables = self.trainables
        trainables.check_open("compile()")
        if self._compiled or trainables.in_use:
            when = "a second time" if self._compiled else "inside a forward or inside gathered_parameters()"
            raise UsageError(f"compile() was called {when}. Call it once, after shardline.initialize.")
        self._compiled = True
        self.on_destroy(compile_blocks(self.module, [unit.plan for unit in trainables.layout.units], args, kwargs))
        trainables.renew_hooks()

    @outside_modes
    @collective
    def destroy(self) -> None:
        """Take the engine off the model: hooks are gone and parameters are ordinary again, whole on every rank.

        Collective at stage 3. The engine cannot be used afterwards.
        """
        trainables, backwards = self.trainables, self._window.backwards
        if trainables.is_closed:
            return
        trainables.averages.check_hidden("destroy()")
        if backwards:
            what = "a backward" if backwards == 1 else f"{backwards} backwards"
            self.events.emit(Notice(f"destroy() discards the gradients of {what}, which no step has applied"))
        self._backwards.discard()
        self._outcome.finish()
        if trainables.boundary is not None and trainables.boundary.refused:
            why = "ranks did not do the same in it, or none had a backward"
            self.events.emit(Notice(f"step {self.global_steps + 1} was not applied: {why}"))
        self.checkpoints.close()
        trainables.hooks.remove()
        while self._on_destroy:
            self._on_destroy.pop()()
        self.sinks.close()
        trainables.close()
        self._backwards.close()
        self.comm.close()
        self._batches.close()
        del self.checkpoints  # it refers back to the engine: see Trainables.close


def _check_loss(loss: object) -> None:
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        return
    found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    if isinstance(loss, Tensor) and loss.numel() == 1:
        found += " that does not require grad"
    raise UsageError(
        f"engine.backward() was given {found}. Give it a scalar loss that depends on the model's parameters, "
        f"computed with gradients enabled."
    )
