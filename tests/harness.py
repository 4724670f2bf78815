"""What the specification tests share: one description of a run that both the engine and the twin can follow."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch._dynamo  # every optimizer's first step imports it, and it sets an environment variable: not inside a test
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardline.runtime.modes import keep
from tests.models import Loss
from tests.twin import LossScale, Twin

Batch = tuple[Tensor, ...]
Batches = list[list[list[Batch]]]
"""Indexed [step][micro-step][rank]."""
State = dict[str, Tensor]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

STAGES = (0, 1, 2, 3)

full = pytest.mark.slow
"""Runs in `make test-full` only."""

OPTIMIZERS: dict[str, tuple[dict[str, Any], type[torch.optim.Optimizer]]] = {
    # eps well above the noise of a gradient that is nearly zero: Adam would turn its sign into a whole step
    "AdamW": ({"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1}, torch.optim.AdamW),
    "SGD": ({"lr": 5e-2, "momentum": 0.9, "weight_decay": 0.01}, torch.optim.SGD),
}


@dataclass(frozen=True)
class Setup:
    """One way to train; ``config`` says it to the engine and ``twin`` to the twin."""

    dtype: str = "fp32"
    optimizer: str = "AdamW"
    clip: float = 0.0
    accumulation: int = 1
    micro: int = 4
    scale_power: int = 8
    window: int = 1000
    hysteresis: int = 1
    zero: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def config(self, stage: int) -> dict[str, Any]:
        """Each block a unit of its own and nothing kept whole, so that small models shard as large ones do."""
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.micro,
            "gradient_accumulation_steps": self.accumulation,
            "optimizer": {"type": self.optimizer, "params": dict(OPTIMIZERS[self.optimizer][0])},
            "zero_optimization": {
                "stage": stage,
                "unit_min_numel": 1,
                "stage3_param_persistence_threshold": 0,
                **self.zero,
            },
        }
        if self.clip:
            config["gradient_clipping"] = self.clip
        if self.dtype == "bf16":
            config["bf16"] = {"enabled": True}
        if self.dtype == "fp16":
            config["fp16"] = {
                "enabled": True,
                "initial_scale_power": self.scale_power,
                "loss_scale_window": self.window,
                "hysteresis": self.hysteresis,
            }
        return config | self.more

    def twin(self, model: nn.Module, optimizer: Callable[..., torch.optim.Optimizer] | None = None) -> Twin:
        params, kind = OPTIMIZERS[self.optimizer]
        build = optimizer or (lambda masters: kind(list(masters.values()), fused=True, **params))
        scale = LossScale(2.0**self.scale_power, self.window, self.hysteresis) if self.dtype == "fp16" else None
        return Twin(model, build, DTYPES[self.dtype], self.clip, scale, self.accumulation)


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The model as the twin and rank 0 build it."""
    torch.manual_seed(seed)
    return build()


def spread(make: Callable[..., Batch], steps: int, setup: Setup, world: int, **kwargs: Any) -> Batches:
    """Fresh micro-batches for every step, micro-step and rank; ``make(n, seed=...)`` makes one."""
    seeds = itertools.count(1)
    return [
        [[make(setup.micro, seed=next(seeds), **kwargs) for _ in range(world)] for _ in range(setup.accumulation)]
        for _ in range(steps)
    ]


def start(build: Callable[[], nn.Module], config: dict[str, Any], **kwargs: Any) -> Any:
    """An engine on this rank, from the model that the twin builds."""
    import shardline

    return shardline.initialize(model=seeded(build), config=config, **kwargs)[0]


def train(
    build: Callable[[], nn.Module],
    loss_of: Loss,
    batches: Batches,
    configs: dict[str, Any] | list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """On a rank: train one engine per config; per engine the state, the losses per micro-step, the norm per step."""
    return [_train(build, loss_of, batches, config) for config in ([configs] if isinstance(configs, dict) else configs)]


def _train(build: Callable[[], nn.Module], loss_of: Loss, batches: Batches, config: dict[str, Any]) -> dict[str, Any]:
    rank = dist.get_rank()
    engine = start(build, config)
    losses, norms = [], []
    for window in batches:
        for micro in window:
            loss = loss_of(engine, engine.module, micro[rank])
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        norms.append(as_float(engine.get_global_grad_norm()))
    result = {"state": engine.full_state_dict(), "losses": losses, "norms": norms, "skipped": engine.skipped_steps}
    engine.destroy()
    return result


def train_twin(
    build: Callable[[], nn.Module],
    loss_of: Loss,
    batches: Batches,
    setup: Setup,
    use_norms: Sequence[float] | None = None,
) -> tuple[Twin, dict[str, Any]]:
    """The same with the twin, in this process; losses per micro-step are per rank.

    ``use_norms``: norms by which each step clips, for comparisons bit by bit: the engine adds squares up in an order of
    its own, and the last bit of a norm is a matter of order.
    """
    twin = setup.twin(seeded(build))
    losses, norms = [], []
    for step, window in enumerate(batches):
        for micro in window:
            losses.append([])
            for batch in micro:
                loss = loss_of(twin, twin.model, batch)
                twin.backward(loss)
                losses[-1].append(loss.item())
        twin.step(use_norms[step] if use_norms else None)
        norms.append(twin.norm)
    return twin, {"state": twin.state(), "losses": losses, "norms": norms, "skipped": twin.skipped}


def as_float(value: Any) -> float:
    return math.nan if value is None else float(value)


# --- comparisons ------------------------------------------------------------------------------------------------------

TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 5e-3}
"""fp32: distance of two weights relative to the weight. bf16, fp16: relative to how far the twin moved that weight from
its start, since each step's gradients carry the rounding of the compute dtype (2^-9, 2^-12), and a rounding that falls
the other way feeds back through the weights."""


def assert_identical(actual: State, expected: State) -> None:
    """The same names in the same order, and the same bits."""
    assert list(actual) == list(expected)
    wrong = [name for name in expected if not _equal(actual[name], expected[name])]
    assert not wrong, "not bitwise equal: " + ", ".join(f"{n} (by {_off(actual, expected, n):.1e})" for n in wrong)


def assert_close(
    actual: State, expected: State, dtype: str = "fp32", start: State | None = None, times: float = 1.0
) -> None:
    """Each tensor alike within TOLERANCE[dtype] (times ``times``), by its own Euclidean norm.

    ``start``: the weights before training, which bf16 and fp16 need: see TOLERANCE.
    """
    assert list(actual) == list(expected)
    wrong = []
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        if not want.is_floating_point() or name.rpartition(".")[2] in ("running_mean", "running_var"):
            continue  # statistics are each rank's own
        got, want = got.double(), want.double()
        yard = want if dtype == "fp32" or start is None else want - start[name].double()
        allowed = times * TOLERANCE[dtype] * yard.norm().item() + 1e-7 * want.norm().item() + 1e-30
        off = (got - want).norm().item()
        if not off <= allowed:  # NaN is never right
            wrong.append(f"{name}: off by {off:.2e}, allowed {allowed:.2e}")
    assert not wrong, "; ".join(wrong)


def assert_ranks_agree(results: Sequence[State]) -> None:
    for other in results[1:]:
        assert_identical(_learned(other), _learned(results[0]))


def _learned(state: State) -> State:
    """Without what each rank keeps for itself: statistics of its own batches."""
    return {k: v for k, v in state.items() if not k.endswith(("running_mean", "running_var", "num_batches_tracked"))}


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _off(actual: State, expected: State, name: str) -> float:
    a, b = actual[name].double(), expected[name].double()
    return (a - b).abs().max().item() if a.shape == b.shape else math.nan


def check_against_twin(
    ranks: Callable[..., list[Any]],
    build: Callable[[], nn.Module],
    loss_of: Loss,
    make: Callable[..., Batch],
    *,
    world: int = 2,
    stages: Sequence[int] = STAGES,
    setup: Setup | None = None,
    steps: int = 3,
    timeout: float = 60.0,
) -> None:
    """Train at each stage on ``world`` ranks and compare weights, losses and norms with the twin's."""
    setup = setup or Setup()
    batches = spread(make, steps, setup, world)
    before = setup.twin(seeded(build)).state()
    _, expected = train_twin(build, loss_of, batches, setup)
    results = ranks(train, world, build, loss_of, batches, [setup.config(s) for s in stages], timeout=timeout)
    for i, stage in enumerate(stages):
        try:
            assert_ranks_agree([result[i]["state"] for result in results])
            assert_close(results[0][i]["state"], expected["state"], setup.dtype, before)
            tolerance = TOLERANCE[setup.dtype]
            for rank, result in enumerate(results):
                wanted = [losses[rank] for losses in expected["losses"]]
                torch.testing.assert_close(result[i]["losses"], wanted, rtol=tolerance, atol=tolerance)
                torch.testing.assert_close(result[i]["norms"], expected["norms"], rtol=tolerance, atol=1e-6)
        except AssertionError as error:
            raise AssertionError(f"stage {stage}, {setup.dtype}, {world} ranks: {error}") from error


# --- looking inside: the only places that know the engine's own accessors --------------------------------------------


def transitions(engine: Any) -> tuple[Counter[tuple[str, int]], Counter[str]]:
    """What was sent so far: times by (operation, unit index), and elements by operation, "gather" or "reduce"."""
    return Counter(engine.comm.log.counts), Counter(engine.comm.log.elements)


def loss_scale(engine: Any) -> float:
    """The scale that the next backward will use."""
    return float(engine.loss_scale)


def live_bytes() -> int:
    """Bytes of all storages that some Python object holds on this rank, each storage once; gradients included.

    Independent of what the engine says of itself. Tensors that only autograd's graph holds are not seen.
    """
    gc.collect()
    found: list[Any] = []
    with torch._C.DisableTorchFunctionSubclass():  # sealed parameters guard themselves
        for x in gc.get_objects():
            if issubclass(type(x), torch.UntypedStorage):
                found.append(x)
            for tensor in (
                (x, torch._C.TensorBase.grad.__get__(x) if x.is_leaf else None) if issubclass(type(x), Tensor) else ()
            ):
                if tensor is not None and tensor.device.type != "meta" and tensor.layout == torch.strided:
                    found.append(tensor.untyped_storage())
    # What the compiler keeps of its traces is on meta too, whatever device it claims, and its size may be a symbol.
    storages = {storage._cdata: storage.nbytes() for storage in found if storage.device.type != "meta"}
    return sum(storages.values())


def is_whole(p: nn.Parameter) -> bool:
    """Whether the parameter's data is here, judged by its memory alone."""
    with torch._C.DisableTorchFunctionSubclass():
        return p.untyped_storage().nbytes() >= p.numel() * p.element_size()


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that ``work`` held at once on the CPU beyond what was there before, by torch's own allocator."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        work()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


class Meter(TorchDispatchMode):
    """Counts the bytes of the storages that operations of this thread touch, while they live.

    Attributes:
        most: at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, found)):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        for _ in range(50):  # a transport's thread drops a buffer a moment after it was sent
            if self._live() <= self.most:
                return found
            time.sleep(1e-4)
        self.most = self._live()
        return found

    def _live(self) -> int:
        self._storages = {key: each for key, each in self._storages.items() if not each[0].expired()}
        return sum(size for _, size in self._storages.values())


def most_bytes(work: Callable[[], Any]) -> tuple[Any, int]:
    """What ``work`` returns, and the most that it held at once in tensors that it used, the engine's own included."""
    with keep(Meter()) as meter:
        found = work()
    return found, meter.most
