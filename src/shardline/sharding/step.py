"""The update: one report that ranks compare, one norm, one optimizer step, and the weights that follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from weakref import proxy

import torch
from torch import Tensor
from torch.optim import Optimizer

from shardline.comm import Comm, Work
from shardline.optim import takes_grad_scale
from shardline.optim.clip import clip_divisor, square_sum
from shardline.sharding.bucket import RunTensors
from shardline.sharding.buffer import flat
from shardline.sharding.gradient import GuardedGrad, gradient_error
from shardline.sharding.unit import Unit

__all__ = ["StepReport", "Update", "Verdict"]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What each rank reports to the others once a step, as float64: a column for each attribute.

    Attributes:
        squares: sum of squares of this rank's shard of the summed, unscaled gradients (0-dim, float64).
        weight: what this rank's gradients count for: micro-steps, samples or tokens.
        left_order: whether this rank left an agreed order of collectives since the last step.
        late: units with gradients that no reduction has seen yet.
        samples: samples seen.
        backwards: backwards in this window.
        exit_requested: whether this rank was asked to save and end.
        transitions: digest of the collectives issued since the last step.
        fingerprint: digest of what must be the same on all ranks (:class:`shardline.sharding.consistency.Fingerprint`).
        on_device: the same of what only the device knows (0-dim, float64), if there is such a thing.
        loss: sum of this rank's losses, each times what it counts for (0-dim), if any was seen.
        counted: the sum of what they count for.
        tokens: tokens seen.
        waited: seconds that this rank has waited for the others since the report before.
        groups: the squares of each param group (1-D, float64), where that is asked for: columns at the end.
    """

    squares: Tensor
    weight: float
    left_order: bool
    late: int
    samples: int
    backwards: int
    exit_requested: bool
    transitions: int
    fingerprint: int
    on_device: Tensor | None
    loss: Tensor | None = None
    counted: float = 0.0
    tokens: int = 0
    waited: float = 0.0
    groups: Tensor | None = None

    def stack(self, device: torch.device) -> Tensor:
        """The columns in order (1-D, float64), on ``device``; 0.0 for what is absent."""
        values = [getattr(self, name) for name in _COLUMN]
        on_host = [0.0 if value is None or isinstance(value, Tensor) else value for value in values]
        # One copy to the device: pinned memory would not be faster for so few numbers.
        stacked = torch.tensor(on_host, dtype=torch.float64).to(device, non_blocking=True)
        for index, value in enumerate(values):
            if isinstance(value, Tensor):
                stacked[index] = value.to(device).view(())
        return stacked if self.groups is None else torch.cat([stacked, self.groups.to(device)])


_COLUMN = {column.name: index for index, column in enumerate(fields(StepReport)) if column.name != "groups"}
_SAME = slice(_COLUMN["transitions"], _COLUMN["on_device"] + 1)
"""Columns in which a difference keeps the step from being applied. A list of them would be copied to the device."""


@dataclass
class Verdict:
    """What follows from the reports of all ranks. Tensors stay on the device; ``read`` brings the host's part here.

    Attributes:
        reports: those of all ranks: (ranks, columns).
        norm: L2 norm of the averaged gradients before clipping (0-dim, float64).
        found_inf: 1.0 if the update must not be applied, else 0.0 (0-dim, fp32).
        divisor: what gradients are divided by to be averaged and unscaled (0-dim, float64).
        scale: the same times what clipping divides by (0-dim, float64).
    """

    reports: Tensor
    norm: Tensor
    found_inf: Tensor
    divisor: Tensor
    scale: Tensor
    _host: Tensor | None = field(default=None, init=False, repr=False)
    _arrived: torch.Event | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, reports: Tensor, *, accumulation: float, loss_scale: float, clip: float, check: bool) -> Verdict:
        """Combine ``reports`` (ranks, columns), in rank order, so that every rank has the same bits.

        Args:
            accumulation: what every backward was divided by already: the divisor of the average is the sum of all
                weights over it.
            loss_scale: is divided by as well.
            clip: the norm to which gradients are clipped; 0.0 for none.
            check: whether gradients that are not finite keep the step from being applied.
        """
        weight, late, backwards = (reports[:, _COLUMN[name]] for name in ("weight", "late", "backwards"))
        total = reports[:, _COLUMN["squares"]].sum()
        divisor = weight.sum() / accumulation * loss_scale
        norm = total.sqrt() / divisor
        found_inf = ~torch.isfinite(norm) if check else torch.zeros_like(norm, dtype=torch.bool)
        # Ranks that sent different things have exchanged wrong ranges; those with late gradients need another round.
        differ = (reports[:, _SAME] != reports[0, _SAME]).any()
        found_inf = found_inf | differ | (late != 0).any() | (backwards.sum() == 0)
        scale = divisor * clip_divisor(norm, clip)
        return cls(reports, norm, found_inf.float(), divisor, scale)

    def send(self) -> Tensor:
        """Start to bring the host's part here: a later :meth:`read` waits for nothing that is queued after this."""
        host = found = torch.cat(
            [self.reports.flatten(), torch.stack([self.norm, self.found_inf.double(), self.divisor, self.scale])]
        )
        if found.device.type != "cpu":
            host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            host.copy_(found, non_blocking=True)
            self._arrived = torch.accelerator.current_stream(found.device).record_event()
        self._host = host
        return host

    def read(self, waiting: Callable[[], AbstractContextManager[None]] = nullcontext) -> HostVerdict:
        """The host's part. An accelerator is waited for, within ``waiting``, for what came before :meth:`send`."""
        host = self.send() if self._host is None else self._host
        if self._arrived is not None and not self._arrived.query():
            with waiting():
                self._arrived.synchronize()
        *numbers, norm, found_inf, divisor, scale = host.tolist()
        columns = [numbers[index :: self.reports.shape[1]] for index in range(self.reports.shape[1])]
        column = {name: columns[index] for name, index in _COLUMN.items()}
        counted = sum(column["counted"])
        same = {name: all(value == values[0] for value in values) for name, values in column.items()}
        return HostVerdict(
            skipped=bool(found_inf),
            norm=norm,
            scale=scale,
            diverged=not same["transitions"],
            left_order=any(column["left_order"]),
            late=any(column["late"]),
            samples=int(sum(column["samples"])),
            backwards=int(sum(column["backwards"])),
            exit_requested=any(column["exit_requested"]),
            consistent=same["fingerprint"] and same["on_device"],
            loss=sum(column["loss"]) / counted if counted else None,
            tokens=int(sum(column["tokens"])),
            waited=tuple(column["waited"]),
            idle=tuple(
                rank
                for rank, (count, weight) in enumerate(zip(column["backwards"], column["weight"], strict=True))
                if weight and not count
            ),
            group_norms=tuple(math.sqrt(sum(squares)) / divisor for squares in columns[len(_COLUMN) :]),
        )


@dataclass(frozen=True)
class HostVerdict:
    """What the host needs to know of a step, and what events report of it.

    Attributes:
        loss: mean over all ranks; None where none was seen.
        waited: seconds that each rank has waited for the others since the step before, by rank.
        group_norms: of the gradients of each param group, where asked for.
        idle: ranks that counted for the average, and had no backward.
    """

    skipped: bool
    norm: float
    scale: float
    diverged: bool
    left_order: bool
    late: bool
    samples: int
    backwards: int
    exit_requested: bool = False
    consistent: bool = True
    loss: float | None = None
    tokens: int = 0
    waited: tuple[float, ...] = ()
    group_norms: tuple[float, ...] = ()
    idle: tuple[int, ...] = ()

    @property
    def refused(self) -> bool:
        """Whether this was not a step: the ranks did not do, or did not have, the same, or none had a backward."""
        return self.diverged or not self.consistent or not self.backwards


def _read(run: RunTensors, operation: str) -> Tensor:
    """The gradients of ``run`` between backward and step; raises where they are not reduced."""
    name = f"the optimizer's {', '.join(repr(fragment.name) for fragment in run.fragments[:3])}"
    if run.bucket.grads.full(name, operation) is None:
        return torch.zeros_like(run.param)
    grad = run.bucket.grads.of_run(run.run)
    is_copy = run.bucket.grads.dtype != run.bucket.weights.master_dtype  # what is done to it would be lost
    if grad is None or is_copy:
        raise gradient_error(name, operation)
    return grad


class Update:
    """Applies the optimizer to this rank's runs and brings the result into everyone's weights.

    Attributes:
        runs: this rank's runs in plan order; the optimizer's parameters.
        device: where they are, with their gradients and the optimizer's state.
    """

    def __init__(self, units: Sequence[Unit], comm: Comm, optimizer: Optimizer, runs: Sequence[RunTensors]) -> None:
        self.units, self.comm, self.optimizer, self.runs = units, comm, optimizer, runs
        self.device = units[0].state_device if units else comm.device
        self.applying = False
        self._guarded = self._scale_is_out = False

    def squares(self) -> Tensor:
        """Sum of squares of this rank's shard of the gradients, whatever part of them the stage keeps here."""
        shards = [
            bucket.shard.own(bucket.grads.reduced)
            for unit in self.units
            for bucket in unit.trainable
            if bucket.grads.reduced is not None
        ]  # replicated gradients count once: each rank its own shard of them
        return square_sum(shards, self.device)

    def squares_of_groups(self) -> Tensor | None:
        """The same for each param group (1-D, float64); None where there is only one."""
        count = len(self.optimizer.param_groups)
        if count < 2:
            return None
        parts: list[list[Tensor]] = [[] for _ in range(count)]
        for run in self.runs:
            if (reduced := run.bucket.grads.reduced) is not None:
                low, high = run.own_range()
                start = run.bucket.shard.states[0]
                parts[run.run.group].append(reduced[low - start : high - start])
        return torch.stack([square_sum(each, self.device) for each in parts])

    def needs_host(self, hooked: bool) -> bool:
        """Whether a step must know on the host what its gradients are: not with fused kernels that no hook watches."""
        optimizer = self.optimizer
        hooked = hooked or bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
        return hooked or not takes_grad_scale(optimizer)

    def attach(self, runs: Sequence[RunTensors]) -> None:
        """Give the optimizer the gradients of ``runs``: views of the reduced ones, in the dtype of the masters."""
        for run in runs:
            run.param.grad = run.bucket.grads.of_run(run.run)

    def detach(self, runs: Sequence[RunTensors]) -> None:
        for run in runs:
            run.param.grad = None

    def guard_grads(self, *, scale_is_out: bool) -> None:
        """From backward to step: let a read of ``.grad`` of what the optimizer holds give the gradient, or raise.

        ``scale_is_out``: what a GradScaler multiplied the loss by was taken out: its ``unscale_`` does nothing then.
        """
        self._scale_is_out = scale_is_out
        if not self._guarded:
            self._guarded = True
            for run, guarded in zip(self.runs, self._guards, strict=True):
                run.param.grad = guarded

    def unguard_grads(self) -> None:
        if self._guarded:
            self._guarded = False
            self.detach(self.runs)

    @cached_property
    def _guards(self) -> list[GuardedGrad]:
        # Weak references: the collector does not see what a tensor in .grad refers to, and states on a device are free
        # with the last reference, not when a cycle is collected.
        update = proxy(self)
        return [
            GuardedGrad.stand_for(run.param, partial(_read, proxy(run)), lambda: update._scale_is_out)
            for run in self.runs
        ]

    def unscale(self, scale: float | Tensor) -> None:
        """Divide the attached gradients by ``scale``, a number or a 0-dim tensor where they are."""
        grads = [run.param.grad for run in self.runs if run.param.grad is not None]
        if grads and (isinstance(scale, Tensor) or scale != 1.0):
            torch._foreach_div_(grads, scale)

    def apply(
        self,
        verdict: Verdict,
        host: HostVerdict | None,
        clip: float,
        before: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> None:
        """Step the optimizer, unless the verdict says not to, and refresh the weights.

        Args:
            verdict: on the device; what fused optimizers follow without the host knowing.
            host: the same on the host where it is known; then a skipped step does not call the optimizer at all.
            clip: the norm to which gradients are clipped again after ``before`` may have changed them.
            before: called with averaged gradients attached, where the user wants to see or change them.
            after: called when masters and state are new and the weights do not follow from them yet.
        """
        self.unguard_grads()
        if host is not None and host.skipped:
            return
        works: list[Work] = []
        for units, runs in self._portions(hooked=before is not None or after is not None):
            self._update(runs, verdict, host, clip, before)
            if after is not None:
                after()
            works += [work for unit in units for work in unit.refresh()]
        for work in works:  # no weights are seen half gathered
            work.wait()

    def _portions(self, *, hooked: bool) -> Iterable[tuple[Sequence[Unit], Sequence[RunTensors]]]:
        """What one call of the optimizer updates: everything, or one unit.

        By units, the weights of one go to the device while the next is updated. An optimizer leaves out what has
        no gradient; otherwise the known ones do not depend on how often they are called.
        """
        offloads = any(unit.host is not None for unit in self.units)
        if hooked or not offloads or not takes_grad_scale(self.optimizer) or self.optimizer._optimizer_step_post_hooks:
            return [(self.units, self.runs)]
        return self._by_unit

    @cached_property
    def _by_unit(self) -> list[tuple[Sequence[Unit], Sequence[RunTensors]]]:
        return [([unit], [run for run in self.runs if run.bucket in unit.buckets]) for unit in self.units]

    @cached_property
    def _has_float64(self) -> bool:
        return any(run.param.dtype is torch.float64 for run in self.runs)

    def _update(
        self,
        runs: Sequence[RunTensors],
        verdict: Verdict,
        host: HostVerdict | None,
        clip: float,
        before: Callable[[], None] | None,
    ) -> None:
        """Step the optimizer on ``runs``, with ``before`` as :meth:`apply` says."""
        self.attach(runs)
        self.applying = True
        try:
            scale, host_scale = verdict.scale, None if host is None else host.scale
            if before is not None:
                self.unscale(float(verdict.divisor))
                before()
                total = self.comm.all_gather_vector(square_sum(self._own_grads(), self.device).view(1)).sum()
                scale = clip_divisor(total.sqrt(), clip)
                host_scale = float(scale)
            self.comm.check_unread(run.param for run in runs)
            self._step(scale, verdict.found_inf, host_scale)
        finally:
            self.applying = False
            self.detach(runs)

    def _own_grads(self) -> list[Tensor]:
        """The attached gradients, each element on one rank only."""
        own = []
        for run in self.runs:
            grad = run.param.grad
            if grad is not None:
                low, high = run.own_range()
                own.append(flat(grad)[low - run.run.start : high - run.run.start])
        return own

    def _step(self, scale: Tensor, found_inf: Tensor, host_scale: float | None) -> None:
        """``host_scale`` is the value of ``scale`` where the host has it: then gradients are finite, too."""
        optimizer = self.optimizer
        if host_scale == 1.0:
            optimizer.step()
        elif takes_grad_scale(optimizer):
            taken: Tensor | None = scale.float()  # what fused kernels take
            if self._has_float64:  # for which that is not exact enough
                self.unscale(scale)
                taken = None
            optimizer.grad_scale, optimizer.found_inf = taken, found_inf  # type: ignore[attr-defined]
            try:
                optimizer.step()
            finally:
                del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        else:
            self.unscale(scale if host_scale is None else host_scale)
            optimizer.step()
