"""The engine: glue between the user's loop (forward, backward, step) and the units, the schedule and the update."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardline.build import Layout, group_parameters, regroup
from shardline.checkpoint.checkpointer import Checkpointer
from shardline.checkpoint.parts import Parts
from shardline.checkpoint.window import WindowStart
from shardline.comm import Comm, digest
from shardline.config import Config
from shardline.data import Loader
from shardline.data.split import Position
from shardline.errors import DisagreementError, UsageError
from shardline.events import Events, Notice, PhaseTimes, StepDone, StepSkipped
from shardline.fragments import ParamState, StateFragment, local_fragments, whole_weights
from shardline.hooks import Hooks, alias_outputs, watch_outputs
from shardline.memory import peak_bytes
from shardline.placement import STAGES, Placement
from shardline.precision import LossScaler, Precision
from shardline.schedule import Schedule
from shardline.step import HostVerdict, Row, Update, Verdict
from shardline.topology import Topology
from shardline.unit import Unit, replaced_error

__all__ = ["Engine", "StepHook"]

_NO_BACKWARD = (
    "step() was called without a backward since the last step, on any rank. Call engine.backward(loss) first."
)

StepHook = Callable[[list[StateFragment]], None]


@dataclass
class _Window:
    """What one accumulation window has seen so far on this rank."""

    steps: int = 0  # micro-steps
    weight: float = 0.0
    samples: int = 0
    loss: Tensor | None = None
    backwards: int = 0
    unreduced: bool = False  # gradients of the last backward are on this rank only
    handed: bool = False  # the engine's loader has handed out a batch for it
    begun: bool = False  # a forward with gradients has drawn random numbers and updated buffers

    def add_loss(self, loss: Tensor) -> None:
        self.loss = loss if self.loss is None else self.loss + loss


@dataclass
class Handle:
    """Takes a registered function off again."""

    hooks: list[StepHook]
    hook: StepHook

    def remove(self) -> None:
        if self.hook in self.hooks:
            self.hooks.remove(self.hook)


@dataclass
class _Clock:
    """Seconds by phase since the last step; synchronises the device, so it runs only when asked for."""

    enabled: bool
    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if not self.enabled:
            yield
            return
        start = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


class Engine(nn.Module):
    """A model that trains itself over many ranks. Made by :func:`shardline.initialize`.

    It is an ``nn.Module`` whose child ``module`` is the user's model; attributes that it does not have are the model's.

    Attributes:
        module: the user's model; its parameters are views of the engine's buffers.
        optimizer: a ``torch.optim.Optimizer`` over this rank's runs, or ``None``.
        lr_scheduler: stepped after every applied step; may be set to ``None`` to step it oneself.
        training_dataloader: the loader of ``training_data``, or ``None``.
        config: the typed configuration.
        topology: rank, world size, device of this process.
        events: the stream of what happens; ``events.subscribe(fn)`` to listen.
        global_steps: optimizer steps, skipped ones included.
        micro_steps: calls of :meth:`step`.
        global_samples: samples of all ranks together that the steps have seen.
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
        self.global_steps = self.micro_steps = self.global_samples = 0
        self._skipped_steps = 0
        self._layout, self._groups, self._whole = layout, groups, whole
        self._parked: dict[str, ParamState] = {}
        self._trained = {name: param.requires_grad for name, param in layout.params.items()}
        self._accumulation = config.gradient_accumulation_steps
        self._window = _Window()
        self.window_start = WindowStart(model, comm.device)
        self.checkpoints = Checkpointer(self)
        self.client_state: dict[str, Any] = {}
        self._boundary: bool | None = None
        self._no_sync = False
        self._in_engine_backward = False
        self._loader_position: Position | None = None
        self._share = 1.0
        self._before: list[StepHook] = []
        self._after: list[StepHook] = []
        self._pending: Verdict | None = None
        self._norm: Tensor | float | None = None
        self._applied = False
        self._destroyed = False
        self._plain = False  # a backward of this window was not the engine's
        self._leaving = False  # some rank was asked to save and end
        self._unwatched = False  # an output of this window is not seen when a backward enters it
        self._clock = _Clock(config.wall_clock_breakdown, comm.device)
        self._last_step = time.perf_counter()
        # Reading a verdict waits for the device: done at once where that is free (CPU) or needed (the loss scale).
        self._reads_at_once = comm.device.type == "cpu" or self.scaler.dynamic
        self._holders = [
            (module, key, param)
            for module in model.modules()
            for key, param in module._parameters.items()
            if param is not None
        ]
        self._arrange()
        if optimizer is not None:
            _guard(optimizer, self)

    def _arrange(self) -> None:
        """Schedule, hooks and update for the current layout."""
        zero = self.config.zero_optimization
        units = self._layout.units
        self.schedule = Schedule(
            units,
            self.comm.all_alike,
            prefetch=zero.stage3_prefetch_bucket_size > 0,
            reshard_after_forward=zero.reshard_after_forward,
            max_kept=zero.stage3_max_live_parameters,
        )
        self._hooks = Hooks(self.module, units, self.schedule, self._begin_forward)
        self._update = None if self.optimizer is None else Update(units, self.comm, self.optimizer, self._layout.runs)
        self._trainable = [param for unit in units for slab in unit.trainable for param in slab.params]

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on inputs whose floating tensors are cast to the compute dtype. Returns what it returns."""
        self._check_alive("forward")
        if self.precision.cast_inputs:
            args, kwargs = self.precision.cast(args), self.precision.cast(kwargs)
        try:
            with self._clock.phase("forward"), self._autocast():
                output = self.module(*args, **kwargs)
        except BaseException:
            self._hooks.unwind()
            raise
        if torch.is_grad_enabled() and self._trainable:
            if self.scaler.scale != 1.0:
                output, complete = alias_outputs(output)
                self._unwatched = self._unwatched or not complete
            watched = watch_outputs(
                output, self._plain_backward, self._end_backward, self._entry_scale, self._trainable
            )
            self._unwatched = self._unwatched or not watched
        return output

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self.precision.autocast
        return nullcontext() if dtype is None else torch.autocast(self.comm.device.type, dtype=dtype)

    def _begin_forward(self) -> None:
        """The model's forward begins outside of any backward: the moment to notice what changed since the last one."""
        if torch.is_grad_enabled() and not self._window.begun:
            self._window.begun = True
            if self.window_start.random is None:
                self.window_start.mark(self._loader_position)
        if self._window.backwards:
            return
        self._check_held()
        if self.optimizer is None:
            return
        if self._trained != self._requires_grad():
            self._regroup()

    def _requires_grad(self) -> dict[str, bool]:
        """Which parameters their owner wants trained now."""
        return {name: param.requires_grad for name, param in self._layout.params.items()}

    def _batch_comes(self, position: Position) -> None:
        """The engine's loader hands out a batch. If it is the first of a window, this is where a resume begins."""
        if not (self._window.begun or self._window.backwards or self._window.steps):
            self._window.handed = True
            self.window_start.mark(position)

    def _check_held(self) -> None:
        """See that nobody replaced a parameter of the model, or its tensor."""
        for module, key, param in self._holders:
            found = module._parameters.get(key)
            if found is not param:
                name = next(name for name, known in self._layout.params.items() if known is param)
                raise replaced_error(name, param if found is None else found)
        for unit in self._layout.units:
            for slab in unit.slabs:
                slab.check_in_place()

    # -- backward ---------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Add the gradients of ``loss`` (scalar) to this window's, and reduce them where the stage says so.

        ``loss`` is divided by the accumulation steps (unless ``scale_wrt_gas`` is false: it is already) and multiplied
        by the loss scale; a batch of the engine's own loader that is smaller than the others counts for its samples.

        Plain ``loss.backward()`` means the same, except in fp16: there the engine scales what enters the model's
        outputs, and a loss term beside them (a penalty on the weights) would stay unscaled. Use this method for it.

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
        divisor = self._accumulation if scale_wrt_gas else 1
        factor = self._micro_share() / divisor
        self._start_backward(factor=1.0)
        self._in_engine_backward = True
        try:
            with self._clock.phase("backward"):
                scaled = loss.float() if loss.dtype is torch.float16 else loss
                scaled.backward(torch.full_like(scaled, factor * self.scaler.scale), retain_graph=retain_graph)
        except BaseException:
            self.schedule.abort_backward()
            raise
        finally:
            self._in_engine_backward = False
        self._end_backward()
        reported = loss.detach() / divisor
        self._window.add_loss(reported)
        return reported

    def _start_backward(self, *, factor: float) -> None:
        window = self._window
        row = STAGES[self.config.zero_optimization.stage]
        every_time = row.gradients is not Placement.PARTIAL
        reducing = not self._no_sync and (every_time or self.is_gradient_accumulation_boundary())
        window.backwards += 1
        window.unreduced = not reducing
        self.schedule.begin_backward(reducing=reducing, factor=factor)

    def _end_backward(self) -> None:
        with self._clock.phase("reduce"):
            self.schedule.end_backward()

    def _plain_backward(self) -> bool:
        """``loss.backward()`` was called by the user; whether this is the first to be heard of it."""
        if self.schedule.in_backward:
            return False
        self._check_trains("loss.backward()")
        self._plain = True
        self._start_backward(factor=self._micro_share() / self._accumulation)
        return True

    def _entry_scale(self) -> float:
        """What the gradient that enters a plain backward is multiplied by; the rest is done when it is collected."""
        return 1.0 if self._in_engine_backward else self.scaler.scale

    def _micro_share(self) -> float:
        """How much this micro-step counts, 1.0 unless the engine's own loader has just handed out a smaller batch."""
        loader = self.training_dataloader
        if loader is not None and loader.position != self._loader_position:
            self._share = loader.weight if self.config.data_loader.weighting == "samples" else 1.0
        return self._share

    def _collect_unseen(self) -> None:
        """Gradients of a backward that nothing announced, such as one through ``model.encode()``."""
        unseen = any(unit.has_grad() for unit in self._layout.units)
        if (unseen or self._plain) and self.scaler.scale != 1.0 and self._unwatched:
            self._drop_gradients()
            raise UsageError(
                "a plain loss.backward() ran in fp16 through outputs that the engine cannot see, so the loss was not "
                "scaled. Call engine.backward(loss) instead."
            )
        if not unseen and (self._window.backwards or self.comm.world_size == 1):
            return
        # A rank without a backward still joins the reductions of those that had one.
        self._start_backward(factor=self._micro_share() / self._accumulation)
        self._window.backwards -= not unseen
        self._end_backward()

    # -- step -------------------------------------------------------------------------------------------------------

    def step(self, weight: float | None = None, *, boundary: bool | None = None, lr_kwargs: Any = None) -> None:
        """End a micro-step; at the accumulation boundary, update the weights.

        Gradients are averaged over the micro-steps of the window on all ranks, each counting as much as it holds
        samples. Averaged, clipped, applied; then gradients are zero and the scheduler has stepped.

        Args:
            weight: of this micro-step, where the losses given to ``backward`` were **sums** over ``weight`` samples or
                tokens: the gradient is then divided by the sum of all weights. Not for losses that are means.
            boundary: whether the window ends here, whatever was counted; ``True`` applies an incomplete window, which
                is averaged over what it holds.
            lr_kwargs: keyword arguments for the scheduler's ``step``.

        Raises:
            UsageError: without an optimizer, or if the window has seen no backward.
            DisagreementError: if ranks did not issue the same collectives; no weight was changed.
            CheckpointError: if the checkpoint that is due after this step could not be written; the step is done.
            SystemExit: after a SIGTERM, once the checkpoint is written, where ``checkpoint.save_on_sigterm`` is set.
        """
        self._check_trains("step()")
        ends = self.is_gradient_accumulation_boundary() if boundary is None else boundary
        share = self._micro_share()
        if weight is not None and share != 1.0:
            raise UsageError(
                f"step(weight=...) says that losses are sums, but this batch of the engine's loader holds {share:.3g} "
                f'of a full one and was weighted as a mean. Set "data_loader": {{"weighting": "none"}}.'
            )
        if any(unit.holds for unit in self._layout.units):
            raise UsageError("step() was called inside a forward or inside gathered_parameters(). Call it after them.")
        self._collect_unseen()
        window = self._window
        if ends and not window.backwards and self.comm.world_size == 1:
            raise UsageError(_NO_BACKWARD)
        window.steps += 1
        window.weight += share if weight is None else float(weight)
        window.samples += self._samples_seen()
        self.micro_steps += 1
        self._note_loader()
        if not ends:
            self._applied = False
            return
        if self._trained != self._requires_grad():
            raise UsageError(
                "requires_grad of a parameter changed inside an accumulation window. Change it right after a step, "
                "before the next forward."
            )
        with self._clock.phase("step"):
            self._end_window(window, lr_kwargs or {})
        self.window_start.mark(self._loader_position)
        self.checkpoints.after_step(leave=self._leaving)

    def _end_window(self, window: _Window, lr_kwargs: dict[str, Any]) -> None:
        self._resolve()
        update = self._update
        if update is None:
            raise AssertionError("an engine without optimizer does not step")
        units = self._layout.units
        for unit in units:
            unit.adopt()
        if window.unreduced and self.comm.world_size > 1:
            for unit in reversed(units):
                unit.reduce(1.0)
                unit.finish_reduce()
        verdict = self._judge(window)
        host = self._read(verdict)
        if host is not None and host.late:
            self._reduce_late()
            verdict = self._judge(window)
            host = self._read(verdict)
        rates = self.get_lr()
        scale_before = self.scaler.scale
        if host is not None:
            if host.diverged:
                self._refuse()
            if not host.backwards:
                self._drop_gradients()
                raise UsageError(_NO_BACKWARD)
            self.scaler.update(overflow=host.skipped)
            self._settle(host)
        with self._clock.phase("gather"):
            for work in [work for unit in units for work in unit.share_grads()]:
                work.wait()
        before = (lambda: self._call(self._before)) if self._before else None
        after = (lambda: self._call(self._after)) if self._after else None
        update.apply(verdict, host, self.config.gradient_clipping, before, after)
        self._applied = host is None or not host.skipped
        self._drop_gradients()
        if self._applied:
            torch.autograd.graph.increment_version(self._trainable)
            for unit in units:
                unit.settle_versions()
            if self.lr_scheduler is not None:
                self.lr_scheduler.step(**lr_kwargs)
        self._pending = verdict if host is None else None
        self._norm = verdict.norm if host is None else host.norm
        self._report(window, host, rates, scale_before)

    def _judge(self, window: _Window) -> Verdict:
        """One small collective: what the ranks' gradients, weights and doings say together."""
        self.schedule.finish_reductions()
        update = self._update
        if update is None:
            raise AssertionError("an engine without optimizer does not step")
        self._log = self.comm.take_log()
        late = sum(unit.has_partial() for unit in self._layout.units)
        row = Row(
            squares=update.squares(),
            weight=window.weight,
            transitions=digest(*self._log.values()),
            orders=self.schedule.record(),
            late=late,
            samples=window.samples,
            backwards=window.backwards,
            leaving=self.checkpoints.leaving.asked,
        )
        return Verdict.of(
            self.comm.rows(row.stack(self.comm.device)),
            unit_weight=self._accumulation,
            loss_scale=self.scaler.scale,
            clip=self.config.gradient_clipping,
            check=self.config.bf16.check_grad_overflow or not self.config.bf16.enabled,
        )

    def _read(self, verdict: Verdict) -> HostVerdict | None:
        update = self._update
        blind = update is not None and update.needs_host(bool(self._before))
        return verdict.read() if self._reads_at_once or blind else None

    def _resolve(self) -> None:
        """Read the verdict of the step before, which nobody waited for."""
        if self._pending is None:
            return
        host, self._pending = self._pending.read(), None
        if host.diverged:
            raise DisagreementError(
                "ranks did not issue the same collectives in the step before, which was therefore not applied. Give "
                "every rank the same sequence of forwards; run forwards that differ inside gathered_parameters()."
            )
        self._settle(host)
        if host.skipped:
            why = "late gradients of a unit" if host.late else "gradients that are not finite"
            self.events.emit(StepSkipped(self.global_steps, why, None, None))

    def _settle(self, host: HostVerdict) -> None:
        if host.skipped:
            self._skipped_steps += 1
        if host.same_orders:
            self.schedule.adopt_record()
        self.global_samples += host.samples
        self._leaving = self._leaving or host.leaving

    def _reduce_late(self) -> None:
        """A second round for gradients that came after their unit was reduced, on every rank alike."""
        late = [unit.index for unit in self._layout.units if unit.has_partial()]
        for index in sorted({index for indices in self.comm.exchange(late) for index in indices}):
            self._layout.units[index].reduce(1.0)
            self._layout.units[index].finish_reduce()

    def _refuse(self) -> None:
        """Ranks exchanged the wrong ranges: name both sides, before any weight was touched."""
        names = [unit.name for unit in self._layout.units]
        logs = self.comm.exchange({operation: list(units) for operation, units in self._log.items()})
        self._drop_gradients()
        for rank, log in enumerate(logs):
            for operation in log:
                ours, theirs = logs[0][operation], log[operation]
                if ours == theirs:
                    continue
                spot = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
                spot = min(len(ours), len(theirs)) if spot is None else spot
                here, there = (repr(names[each[spot]]) if spot < len(each) else "none" for each in (ours, theirs))
                raise DisagreementError(
                    f"ranks did not use the same units in the same order, so this step was not applied: as {operation} "
                    f"{spot + 1} since the last step, rank 0 had unit {here} and rank {rank} unit {there}. Give every "
                    f"rank the same sequence of forwards; run forwards that differ by rank inside "
                    f"engine.gathered_parameters()."
                )

    def _report(self, window: _Window, host: HostVerdict | None, rates: list[float], scale_before: float) -> None:
        self.global_steps += 1
        now = time.perf_counter()
        seconds, self._last_step = now - self._last_step, now
        scaled = self.precision.compute is torch.float16
        if host is not None and host.skipped:
            self.events.emit(
                StepSkipped(
                    self.global_steps,
                    "gradients that are not finite",
                    scale_before if scaled else None,
                    self.scaler.scale if scaled else None,
                )
            )
        else:
            loss = window.loss if window.loss is None else window.loss * (self._accumulation / window.steps)
            self.events.emit(
                StepDone(
                    step=self.global_steps,
                    loss=loss,
                    lr=rates,
                    grad_norm=self._norm,
                    loss_scale=scale_before if scaled else None,
                    samples=host.samples if host is not None else window.samples * self.comm.world_size,
                    seconds=seconds,
                    memory_bytes=peak_bytes(self.comm.device),
                )
            )
        if self._clock.enabled:
            self.events.emit(PhaseTimes(self.global_steps, dict(self._clock.seconds)))
            self._clock.seconds.clear()

    def _drop_gradients(self) -> None:
        self.schedule.finish_reductions()
        for unit in self._layout.units:
            unit.drop_grads()
        self._window = _Window()
        self._plain = self._unwatched = False

    def _samples_seen(self) -> int:
        loader = self.training_dataloader
        if loader is not None and loader.position != self._loader_position:
            return loader.samples
        return self.config.train_micro_batch_size_per_gpu

    def _note_loader(self) -> None:
        if self.training_dataloader is not None:
            self._loader_position = self.training_dataloader.position
        self._share = 1.0

    def _call(self, hooks: list[StepHook]) -> None:
        if hooks and self._update is not None and self.optimizer is not None:
            fragments = list(local_fragments(self._update.runs, self.optimizer))
            for hook in list(hooks):
                hook(fragments)

    # -- accumulation -----------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard what this window has accumulated and what is in flight. Where in the window we are stays."""
        steps = self._window.steps
        self._drop_gradients()
        self._window.steps = steps
        for param in self.module.parameters():
            param.grad = None

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-step is the last of its window."""
        if self._boundary is not None:
            return self._boundary
        return self._window.steps + 1 >= self._accumulation

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Say whether the current micro-step and those after it end a window; ``None`` goes back to counting."""
        self._boundary = is_boundary

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

    def full_state_dict(self, dtype: torch.dtype | None = None, rank0_only: bool = False) -> dict[str, Tensor]:
        """The whole weights and persistent buffers under the model's own names, on CPU. Collective, at every stage.

        Args:
            dtype: of floating weights; ``None`` leaves that of the masters, fp32 where there are any.
            rank0_only: other ranks take part and get an empty dict.
        """
        self._check_alive("full_state_dict()")
        wanted = not rank0_only or self.comm.rank == 0
        weights: dict[str, Tensor] = {}
        for unit in self._layout.units:
            unit.adopt()
            for entry, tensor in whole_weights(unit):
                if wanted:
                    kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                    value = tensor.detach().to("cpu", kept, copy=True)
                    weights.update(dict.fromkeys(entry.param.aliases, value))
        buffers = self._first_buffers()
        if not wanted:
            return {}
        ordered: dict[str, Tensor] = {}
        for path, module in self.module.named_modules(remove_duplicate=False):
            prefix = path + "." if path else ""
            for name, param in module._parameters.items():
                if param is not None:
                    ordered[prefix + name] = weights[prefix + name]
            for name in module._buffers:
                if prefix + name in buffers:
                    ordered[prefix + name] = buffers[prefix + name]
        return ordered

    def _first_buffers(self) -> dict[str, Tensor]:
        """Rank 0's persistent buffers, on CPU: statistics of its own batches, which differ from the other ranks'."""
        found: dict[str, Tensor] = {}
        for path, module in self.module.named_modules(remove_duplicate=False):
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    copy = buffer.detach().clone()
                    self.comm.broadcast([copy])
                    found[f"{path}.{name}" if path else name] = copy.cpu()
        return found

    @contextmanager
    def gathered_parameters(
        self, params: Iterable[nn.Parameter | str] | nn.Module | None = None, write: bool = False
    ) -> Iterator[None]:
        """Within it, sharded parameters are whole and can be read; with ``write`` they can be changed. Collective.

        What was changed is taken over at the end, everywhere alike: rank 0's values win.

        Args:
            params: parameters, their names, or a module, instead of all. What shares a unit with them comes along.
            write: whether changes shall be kept. Changes without it raise.

        Raises:
            UsageError: for an unknown parameter, or a change without ``write``.
        """
        units = self._units_of(params)
        for unit in units:
            unit.adopt()
            unit.wait()
            unit.holds += 1
        try:
            yield
            if write:
                for unit in units:
                    unit.write_back()
            else:
                edited = [name for unit in units for name in unit.edited()]
                if edited:
                    raise UsageError(
                        f"parameter {edited[0]!r} was changed inside gathered_parameters(). Pass write=True to keep "
                        f"changes on every rank."
                    )
        finally:
            for unit in units:
                unit.holds -= 1
                unit.release()

    def _units_of(self, params: Iterable[nn.Parameter | str] | nn.Module | None) -> list[Unit]:
        if params is None:
            return list(self._layout.units)
        if isinstance(params, nn.Module):
            params = list(params.parameters())
        elif isinstance(params, (nn.Parameter, str)):
            params = [params]
        names = {alias: spec.name for spec in self._layout.plan.params for alias in spec.aliases}
        by_param = {param: name for name, param in self._layout.params.items()}
        found = set()
        for each in params:
            name = names.get(each) if isinstance(each, str) else by_param.get(each)
            if name is None:
                known = ", ".join(list(names)[:5])
                raise UsageError(f"{each!r} is no parameter of this engine's model. Its parameters begin with {known}.")
            found.add(self._layout.plan.where(name)[0].index)
        return [self._layout.units[index] for index in sorted(found)]

    def before_step(self, hook: StepHook) -> Handle:
        """Call ``hook(fragments)`` before every update, with averaged, unscaled, unclipped gradients.

        ``fragments`` are this rank's pieces of parameters (:class:`shardline.fragments.StateFragment`): weights,
        gradients and optimizer state, all views that may be changed in place. Clipping follows, on what is there then.
        """
        self._before.append(hook)
        return Handle(self._before, hook)

    def after_step(self, hook: StepHook) -> Handle:
        """Call ``hook(fragments)`` after every applied update; see :meth:`before_step`. Changed weights are kept."""
        self._after.append(hook)
        return Handle(self._after, hook)

    def _add_group(self, add: Callable[[dict[str, Any]], None], group: dict[str, Any]) -> None:
        """``optimizer.add_param_group`` with parameters of the model: they join at the next forward."""
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
        self._resolve()
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
        if self._update is not None:
            self._update.applying = False

    def _touched(self, unit: Unit) -> bool:
        return self.schedule.touch(unit)

    # -- checkpoints ------------------------------------------------------------------------------------------------

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
        self._resolve()
        for unit in self._layout.units:
            unit.adopt()
        return Parts(self.module, self._layout.units, self._layout.runs, self.optimizer, self._parked, self.comm)

    def checkpoint_counters(self) -> dict[str, int]:
        """Counts at the start of the current window."""
        return {
            "global_steps": self.global_steps,
            "micro_steps": self.micro_steps - self._window.steps,
            "global_samples": self.global_samples,
            "skipped_steps": self._skipped_steps,
        }

    def in_window(self) -> bool:
        """Whether the current window has begun."""
        window = self._window
        return bool(window.handed or window.begun or window.backwards or window.steps)

    def lay_out_by_age(self, ages: Mapping[str, int]) -> None:
        """Lay the model out anew, so that only parameters whose state has seen as many steps share a run."""
        if self.optimizer is not None:
            self.optimizer.state.clear()
        self._parked.clear()
        self._regroup(ages)

    def go_on_from(self, counters: Mapping[str, int] | None) -> None:
        """Begin a new window, with ``counters`` where given."""
        self._drop_gradients()
        self._pending, self._norm, self._applied = None, None, False
        if counters is not None:
            self.global_steps, self.micro_steps = counters["global_steps"], counters["micro_steps"]
            self.global_samples, self._skipped_steps = counters["global_samples"], counters["skipped_steps"]
        self._note_loader()
        self.window_start.mark(self._loader_position)

    # -- the rest of the surface ------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module" or name.startswith("_"):
                raise
            return getattr(self.module, name)

    def was_step_applied(self) -> bool:
        """Whether the last step changed the weights."""
        self._resolve_quietly()
        return self._applied

    @property
    def skipped_steps(self) -> int:
        """Steps whose gradients were not finite, so that nothing was changed."""
        self._resolve_quietly()
        return self._skipped_steps

    def _resolve_quietly(self) -> None:
        if self._pending is not None:
            self._applied = not self._pending.read().skipped
            self._resolve()

    def get_global_grad_norm(self) -> float | Tensor | None:
        """L2 norm of the last step's averaged gradients before clipping; a 0-dim tensor where reading it would wait."""
        return self._norm

    def get_lr(self) -> list[float]:
        """The learning rate of each param group."""
        return [] if self.optimizer is None else [float(group["lr"]) for group in self.optimizer.param_groups]

    @property
    def local_rank(self) -> int:
        return self.topology.local_rank

    @property
    def global_rank(self) -> int:
        return self.topology.rank

    @property
    def world_size(self) -> int:
        return self.topology.world_size

    @property
    def device(self) -> torch.device:
        return self.topology.device

    def train_batch_size(self) -> int:
        return self.config.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.config.train_micro_batch_size_per_gpu

    def gradient_accumulation_steps(self) -> int:
        return self._accumulation

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

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Not supported yet.

        Raises:
            UsageError: always: compiling the whole engine would trace its hooks.
        """
        raise UsageError("engine.compile() is not supported yet. Compile the model's blocks before initialize.")

    def destroy(self) -> None:
        """Take the engine off the model: hooks are gone and parameters are ordinary again, whole on every rank.

        Collective at stage 3. The engine cannot be used afterwards.
        """
        if self._destroyed:
            return
        window = self._window
        if window.backwards:
            self.events.emit(Notice(f"destroy() discards {window.steps} micro-steps that no step has applied"))
        self._drop_gradients()
        self._resolve()
        self.checkpoints.close()
        self._hooks.remove()
        for unit in self._layout.units:
            unit.wait()
            unit.let_go()
        _unguard(self.optimizer)
        self._destroyed = True
        self.comm.close()
        if self.training_dataloader is not None:
            self.training_dataloader.close()

    def _check_alive(self, what: str) -> None:
        if self._destroyed:
            raise UsageError(f"{what} was called after destroy(). Make a new engine with shardline.initialize.")

    def _check_trains(self, what: str) -> None:
        self._check_alive(what)
        if self.optimizer is None:
            raise UsageError(
                f"{what} needs an optimizer, and this engine has none. Give initialize an optimizer, or an "
                f'"optimizer" section in the configuration.'
            )


def _guard(optimizer: Optimizer, engine: Engine) -> None:
    """Give the optimizer's own calls the meaning they have with an engine: gradients are not where it thinks."""
    original = optimizer.step
    add = optimizer.add_param_group

    def step(self: Optimizer, closure: Any = None) -> Any:
        update = engine._update
        if update is None or not update.applying:
            raise UsageError("optimizer.step() was called directly. Call engine.step(), which also talks to the ranks.")
        return original() if closure is None else original(closure)

    def zero_grad(self: Optimizer, set_to_none: bool = True) -> None:
        engine.zero_grad()

    def add_param_group(self: Optimizer, group: dict[str, Any]) -> None:
        engine._add_group(add, group)

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
    optimizer.zero_grad = MethodType(zero_grad, optimizer)  # type: ignore[method-assign]
    optimizer.add_param_group = MethodType(add_param_group, optimizer)  # type: ignore[method-assign]


def _unguard(optimizer: Optimizer | None) -> None:
    """The optimizer's own methods again."""
    if optimizer is not None:
        for name in ("step", "zero_grad", "add_param_group"):
            optimizer.__dict__.pop(name, None)
