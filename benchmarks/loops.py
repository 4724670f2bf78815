"""One function per engine: each makes a step out of the same model, batches, optimizer and clipping.

A step takes the micro-batches of one optimizer step and returns their mean loss. Whatever an engine's documentation
advises to a user who wants speed is used: fused AdamW everywhere, DDP with gradients as views of its buckets,
accumulation without communication where the engine has a switch for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from models import CLIP, LEARNING_RATE, Batch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

Step = Callable[[Sequence[Batch]], Tensor]
ADAMW: dict[str, Any] = {"lr": LEARNING_RATE, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


@dataclass(frozen=True)
class Work:
    """What a loop is made for.

    Attributes:
        dtype: of weights, activations and gradients; masters and moments are fp32 except in the pure loop.
        accumulation: micro-batches of one step.
        micro: samples of one micro-batch, for engines that want to know.
        unit_min_numel: see :class:`models.Model`.
    """

    dtype: torch.dtype = torch.float32
    accumulation: int = 1
    micro: int = 1
    unit_min_numel: int | None = None


class Masters:
    """fp32 masters of low-precision parameters, as a careful user writes them by hand; in fp32 they are the weights.

    Gradients of several micro-steps are added up in fp32 if the caller collects after each.
    """

    def __init__(self, params: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
        self.params = list(params)
        self.same = all(param.dtype == dtype for param in self.params)
        self.masters: list[Tensor] = [p if self.same else p.detach() for p in self.params]
        for param in self.params:
            param.data = param.data.to(dtype)

    def collect(self) -> None:
        """Move what backward left in the parameters to the masters."""
        if self.same:
            return
        for param, master in zip(self.params, self.masters, strict=True):
            if param.grad is not None:
                if master.grad is None:
                    master.grad = param.grad.float()
                else:
                    master.grad.add_(param.grad)
                param.grad = None

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip, step, forget the gradients, and bring the masters into the weights."""
        clip_grad_norm_(self.masters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if not self.same:
            with torch.no_grad():
                torch._foreach_copy_(self.params, self.masters)


def hand(model: nn.Module, work: Work) -> Step:
    """The hand-written loop with fp32 masters and no communication: what computation alone costs."""
    masters = Masters(model.parameters(), work.dtype)
    optimizer = torch.optim.AdamW(masters.masters, fused=True, **ADAMW)

    def step(batches: Sequence[Batch]) -> Tensor:
        losses = []
        for batch in batches:
            loss = model(*batch)
            (loss / len(batches)).backward()
            masters.collect()
            losses.append(loss.detach())
        masters.update(optimizer)
        return torch.stack(losses).mean()

    return step


def pure(model: nn.Module, work: Work) -> Step:
    """The loop without masters: weights, gradients and moments all in the low precision."""
    model.to(work.dtype)
    return hand(model, work)


def ddp(model: nn.Module, work: Work, zero: bool = False) -> Step:
    """DistributedDataParallel and fused AdamW, with hand-made masters below fp32; ``zero`` shards the moments."""
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    masters = Masters(model.parameters(), work.dtype)
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if zero:
        optimizer: torch.optim.Optimizer = ZeroRedundancyOptimizer(
            masters.masters, optimizer_class=torch.optim.AdamW, fused=True, **ADAMW
        )
    else:
        optimizer = torch.optim.AdamW(masters.masters, fused=True, **ADAMW)

    def step(batches: Sequence[Batch]) -> Tensor:
        losses = []
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with contextlib.nullcontext() if last else replica.no_sync():
                loss = replica(*batch)
                (loss / len(batches)).backward()
            losses.append(loss.detach())
        masters.collect()
        masters.update(optimizer)
        return torch.stack(losses).mean()

    return step


def zero_redundancy(model: nn.Module, work: Work) -> Step:
    """DDP with ZeroRedundancyOptimizer."""
    return ddp(model, work, zero=True)


def fsdp2(model: nn.Module, work: Work, reshard: bool = True) -> Step:
    """FSDP2: ``fully_shard`` on every block and on the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = next(model.parameters()).device.type
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device, (dist.get_world_size(),)),
        "reshard_after_forward": reshard,
    }
    if work.dtype != torch.float32:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=work.dtype)
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, **options)
    fully_shard(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)

    def step(batches: Sequence[Batch]) -> Tensor:
        losses = []
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
            loss = model(*batch)
            (loss / len(batches)).backward()
            losses.append(loss.detach())
        clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).mean()

    return step


def fsdp2_keep(model: nn.Module, work: Work) -> Step:
    """FSDP2 whose weights stay gathered between forward and backward."""
    return fsdp2(model, work, reshard=False)


def config(work: Work, stage: int) -> dict[str, Any]:
    """The configuration that DeepSpeed and Shardline share."""
    chosen: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": work.micro,
        "gradient_accumulation_steps": work.accumulation,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": dict(ADAMW)},
        "zero_optimization": {"stage": stage},
    }
    if work.dtype == torch.bfloat16:
        chosen["bf16"] = {"enabled": True}
    return chosen


def _engine_step(engine: Any) -> Step:
    def step(batches: Sequence[Batch]) -> Tensor:
        losses = []
        for batch in batches:
            loss = engine(*batch)
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    return step


def deepspeed(model: nn.Module, work: Work, stage: int) -> Step:
    """DeepSpeed with torch's AdamW: its own CPU Adam would have to be compiled."""
    import deepspeed as library

    chosen = config(work, stage)
    chosen["optimizer"]["params"] |= {"torch_adam": True, "fused": True}
    engine = library.initialize(model=model, model_parameters=model.parameters(), config=chosen)[0]
    return _engine_step(engine)


def shardline(model: nn.Module, work: Work, stage: int, **extra: Any) -> Step:
    """Shardline; ``extra`` are further keys of its configuration."""
    import shardline as library

    chosen = config(work, stage) | extra
    if work.unit_min_numel is not None:
        chosen["zero_optimization"]["unit_min_numel"] = work.unit_min_numel
    return _engine_step(library.initialize(model=model, config=chosen)[0])


@dataclass(frozen=True)
class Engine:
    """A row of the table.

    Attributes:
        make: ``make(model, work)`` gives the step.
        heats: the stages it is compared with; every ratio is taken between engines of one heat.
        needs: module without which it cannot run.
        low_only: makes sense below fp32 only.
    """

    make: Callable[[nn.Module, Work], Step]
    heats: tuple[int, ...]
    needs: str = "torch"
    low_only: bool = False

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None


def _gloo_alone() -> dict[str, Any] | None:
    """The keys that keep Shardline from its other transports, where this version has a choice."""
    from shardline import Config

    key = "communication_transport"
    return {key: "gloo"} if key in Config.model_fields else None


GLOO = _gloo_alone()


def _engines() -> dict[str, Engine]:
    engines = {
        "compute": Engine(hand, (0, 1, 2, 3)),
        "pure": Engine(pure, (0,), low_only=True),
        "ddp": Engine(ddp, (0, 1, 2)),
        "zero-redundancy": Engine(zero_redundancy, (1,)),
        "fsdp2": Engine(fsdp2, (3,)),
        "fsdp2-keep": Engine(fsdp2_keep, (2,)),
    }
    variants = {"": {}} if GLOO is None else {"": {}, "-gloo": GLOO}
    for stage in range(4):
        engines[f"deepspeed-{stage}"] = Engine(lambda m, w, s=stage: deepspeed(m, w, s), (stage,), "deepspeed")
        for name, extra in variants.items():
            engines[f"shardline-{stage}{name}"] = Engine(
                lambda m, w, s=stage, e=extra: shardline(m, w, s, **e), (stage,), "shardline"
            )
    return engines


ENGINES = _engines()
