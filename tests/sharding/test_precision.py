"""Dtypes of weights, masters, gradients and inputs; and the loss scale against a count by hand."""

from __future__ import annotations

import random
from collections import namedtuple

import pytest
import torch
from torch import nn

from shardline.config import load_config
from shardline.plan.placement import Placement
from shardline.sharding.precision import LossScaler, Precision

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def configured(**keys):
    return load_config({"train_micro_batch_size_per_gpu": 1} | keys, 1)


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "compute", "casts"),
    [
        ({}, FP32, False),
        ({"bf16": {"enabled": True}}, BF16, True),
        ({"fp16": {"enabled": True}}, FP16, True),
        ({"fp16": {"enabled": True, "auto_cast": False}}, FP16, False),
    ],
)
def test_compute_dtype(keys, compute, casts) -> None:
    precision = Precision.from_config(configured(**keys))
    assert (precision.compute, precision.cast_inputs) == (compute, casts)
    assert (precision.reduce, precision.accumulate, precision.autocast, precision.buffers) == (None, FP32, None, None)


def test_the_rest_of_the_configuration() -> None:
    precision = Precision.from_config(
        configured(
            bf16={"enabled": True},
            communication_data_type="fp32",
            data_types={"grad_accum_dtype": "bf16", "buffer_dtype": "fp16", "module_dtypes": {"LayerNorm": "fp32"}},
        )
    )
    assert precision.reduce is FP32 and precision.accumulate is BF16 and precision.buffers is FP16
    assert precision.modules == {"LayerNorm": FP32}
    autocast = Precision.from_config(configured(torch_autocast={"enabled": True, "dtype": "bfloat16"}))
    assert autocast.autocast is BF16 and autocast.compute is FP32


@pytest.mark.parametrize(
    ("compute", "module", "stored", "expected"),
    [
        (FP32, nn.Linear(1, 1), FP32, FP32),
        (FP32, nn.Linear(1, 1), FP16, FP32),
        (FP32, nn.Linear(1, 1), FP64, FP64),
        (BF16, nn.Linear(1, 1), FP32, BF16),
        (BF16, nn.BatchNorm1d(1), FP32, FP32),
        (FP16, nn.SyncBatchNorm(1), FP32, FP32),
        (BF16, nn.LayerNorm(1), FP32, BF16),
        (BF16, nn.Linear(1, 1), torch.int64, torch.int64),
    ],
)
def test_param_dtype(compute, module, stored, expected) -> None:
    assert Precision(compute=compute).param_dtype(module, torch.zeros(2, dtype=stored)) is expected


def test_a_chosen_dtype_wins() -> None:
    assert Precision(compute=BF16).param_dtype(nn.LayerNorm(1), torch.zeros(1), FP32) is FP32
    assert Precision(compute=BF16).param_dtype(nn.BatchNorm1d(1), torch.zeros(1), BF16) is BF16
    assert Precision().param_dtype(nn.Linear(1, 1), torch.zeros(1, dtype=torch.int64), BF16) is torch.int64


NORMS = {
    "batch": nn.BatchNorm2d(4),
    "batch without statistics": nn.BatchNorm2d(4, track_running_stats=False),
    "instance": nn.InstanceNorm2d(4, affine=True),
    "instance with statistics": nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "group": nn.GroupNorm(2, 4),
    "layer": nn.LayerNorm(5),
    "rms": nn.RMSNorm(5),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("compute", [BF16, FP16])
def test_norms_run_in_the_dtypes_they_are_given(kind, compute) -> None:
    """On low-precision inputs, forward and backward, near what fp32 gives."""
    module = NORMS[kind]
    precision = Precision(compute=compute)
    low = type(module).__new__(type(module))
    low.__dict__ = dict(module.__dict__, _parameters={}, _buffers=dict(module._buffers))
    for name, param in module._parameters.items():
        low._parameters[name] = None if param is None else nn.Parameter(param.to(precision.param_dtype(module, param)))
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).to(compute)
    out = low(x)
    torch.testing.assert_close(out.float(), module(x.float()), rtol=3e-2, atol=3e-2)
    out.float().square().sum().backward()
    assert all(torch.isfinite(param.grad).all() for param in low.parameters())


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64])
def test_masters_and_gradients_are_at_least_fp32_and_the_weights(dtype) -> None:
    wide = FP64 if dtype is FP64 else FP32
    assert Precision().master_dtype(dtype) is wide and Precision().grad_dtype(dtype) is wide
    assert Precision(accumulate=dtype).grad_dtype(dtype) is dtype
    for between in (Placement.PARTIAL, Placement.SHARDED):
        assert Precision().reduce_dtype(dtype, between) is dtype
        assert Precision(reduce=FP32, accumulates=True).reduce_dtype(dtype, between) is FP32
    assert Precision(accumulates=True).reduce_dtype(dtype, Placement.PARTIAL) is wide
    assert Precision(accumulates=True, accumulate=dtype).reduce_dtype(dtype, Placement.PARTIAL) is dtype
    assert Precision(accumulates=True).reduce_dtype(dtype, Placement.SHARDED) is dtype


def test_integers_have_no_masters() -> None:
    assert Precision().master_dtype(torch.int64) is torch.int64


# --- casts of inputs --------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "left right")


def test_cast_reaches_nested_floats_only() -> None:
    x = torch.ones(2)
    given = [x, (x, {"deep": [x.double(), 3, None, "text"]}), Pair(x, torch.arange(2)), torch.ones(2, dtype=torch.bool)]
    cast = Precision(compute=BF16).cast(given)
    assert cast[0].dtype is BF16 and cast[1][0].dtype is BF16 and cast[1][1]["deep"][0].dtype is BF16
    assert cast[1][1]["deep"][1:] == [3, None, "text"] and type(cast[1]) is tuple
    assert type(cast[2]) is Pair and cast[2].left.dtype is BF16 and cast[2].right is given[2].right
    assert cast[3] is given[3] and x.dtype is FP32 and given[1][0] is x


def test_cast_keeps_gradients_and_complex_numbers() -> None:
    x = torch.ones(2, requires_grad=True)
    Precision(compute=BF16).cast({"x": x})["x"].float().sum().backward()
    assert torch.equal(x.grad, torch.ones(2))
    assert Precision(compute=BF16).cast(torch.ones(1, dtype=torch.complex64)).dtype is torch.complex64


def test_objects_of_other_classes_are_handed_through() -> None:
    class Batch:
        def __init__(self, x):
            self.x = x

    batch = Batch(torch.ones(1))
    assert Precision(compute=BF16).cast(batch) is batch and batch.x.dtype is FP32


# --- torch's complaints of dtypes -------------------------------------------------------------------------------------


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.register_buffer("mask", torch.ones(4, 4))
        self.inner.register_buffer("table", torch.ones(4, dtype=FP64), persistent=False)
        self.register_buffer("low", torch.ones(1, dtype=BF16))
        self.register_buffer("ids", torch.arange(4))
        self.register_buffer("nothing", None)


WRONG = {
    "matmul": lambda x: x @ torch.ones(4, 4),
    "linear": lambda x: nn.Linear(4, 4)(x),
    "added": lambda x: nn.Linear(4, 4).bfloat16()(x + torch.ones(4)),
    "convolution": lambda x: nn.Conv1d(4, 4, 1).bfloat16()(x[..., None] * torch.ones(1)),
    "norm": lambda x: nn.GroupNorm(1, 4).bfloat16()(x.float()),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x[None], x[None].float(), x[None]),
    "recurrent": lambda x: nn.GRU(4, 4).bfloat16()(x.float()),
    "index": lambda x: x.index_put((torch.tensor(0),), torch.ones(4)),
}


@pytest.mark.parametrize("way", WRONG)
def test_a_complaint_of_dtypes_names_the_buffers(way) -> None:
    with pytest.raises((RuntimeError, ValueError)) as caught:
        WRONG[way](torch.ones(4, 4, dtype=BF16))
    assert Precision(compute=BF16).explain(caught.value, Tables())
    (note,) = caught.value.__notes__
    assert "mask (torch.float32)" in note and "inner.table (torch.float64)" in note and '"buffer_dtype": "bf16"' in note
    assert not any(name in note for name in ("running_mean", "low ", "ids"))


def test_other_errors_and_other_precisions_get_no_note() -> None:
    dtypes = RuntimeError("mat1 and mat2 must have the same dtype")
    assert not Precision(compute=FP32, cast_inputs=False).explain(dtypes, Tables())
    assert Precision(compute=BF16).explain(dtypes, nn.Linear(1, 1))
    other = RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x4 and 5x5)")
    assert not Precision(compute=BF16).explain(other, Tables())
    assert not hasattr(dtypes, "__notes__") and not hasattr(other, "__notes__")


# --- loss scale -------------------------------------------------------------------------------------------------------

TABLES = [
    # window, hysteresis, consecutive, minimum, what happens ("x" overflows), scale after each step from 2^4
    (3, 1, False, 1.0, "...x...x", [16, 16, 32, 16, 16, 16, 32, 16]),
    (3, 2, False, 1.0, "xx.x...x", [16, 8, 8, 4, 4, 4, 8, 8]),
    (3, 2, False, 1.0, "x..x...x", [16, 16, 16, 8, 8, 8, 16, 16]),
    (3, 2, True, 1.0, "x.x.xx", [16, 16, 16, 16, 16, 8]),
    (2, 1, False, 4.0, "xxx..", [8, 4, 4, 4, 8]),
    (1, 3, False, 1.0, "xxxx.xx", [16, 16, 8, 4, 8, 8, 8]),
]


@pytest.mark.parametrize(("window", "hysteresis", "consecutive", "minimum", "events", "scales"), TABLES)
def test_dynamic_scale_by_hand(window, hysteresis, consecutive, minimum, events, scales) -> None:
    scaler = LossScaler(16.0, True, window, hysteresis, consecutive, minimum)
    found = []
    for event in events:
        scaler.update(overflow=event == "x")
        found.append(scaler.scale)
    assert found == scales


def by_definition(events: list[bool], window: int, hysteresis: int, consecutive: bool, minimum: float) -> float:
    """DeepSpeed's rule (reference 1.8.7) read off the whole history instead of kept in a state."""
    scale = 2.0**8
    for now, overflow in enumerate(events):
        last = max((i for i in range(now) if events[i]), default=-1)
        grew = [i for i in range(now) if not events[i] and is_growth(events, i, window)]
        refilled = [i for i in range(now) if not events[i]] if consecutive else []
        refilled = max([*grew, *refilled], default=-1)
        if overflow:
            spent = sum(events[refilled + 1 : now])
            scale = max(scale / 2, minimum) if spent >= hysteresis - 1 else scale
        elif (now - last) % window == 0:
            scale *= 2
    return scale


def is_growth(events: list[bool], at: int, window: int) -> bool:
    last = max((i for i in range(at) if events[i]), default=-1)
    return (at - last) % window == 0


@pytest.mark.parametrize("seed", range(20))
def test_dynamic_scale_over_a_random_history(seed) -> None:
    draw = random.Random(seed)
    window, hysteresis = draw.randint(1, 5), draw.randint(1, 4)
    consecutive, minimum = draw.random() < 0.5, draw.choice([1.0, 32.0])
    scaler = LossScaler(2.0**8, True, window, hysteresis, consecutive, minimum)
    events: list[bool] = []
    for _ in range(60):
        events.append(draw.random() < 0.3)
        scaler.update(overflow=events[-1])
        assert scaler.scale == by_definition(events, window, hysteresis, consecutive, minimum), events


def test_a_static_scale_stays() -> None:
    scaler = LossScaler.from_config(configured(fp16={"enabled": True, "loss_scale": 128}))
    for overflow in (True, False, True):
        scaler.update(overflow=overflow)
    assert scaler.scale == 128.0 and not scaler.dynamic


def test_scaler_from_config() -> None:
    assert LossScaler.from_config(configured(bf16={"enabled": True})) == LossScaler()
    fp16 = {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 7, "hysteresis": 3, "min_loss_scale": 2}
    assert LossScaler.from_config(configured(fp16=fp16)) == LossScaler(1024.0, True, 7, 3, False, 2.0)


def test_scaler_goes_on_from_its_state() -> None:
    events = [True, False, True, True, False, False, False, True]
    whole = LossScaler(256.0, True, 3, 2)
    for overflow in events:
        whole.update(overflow=overflow)
    first = LossScaler(256.0, True, 3, 2)
    for overflow in events[:4]:
        first.update(overflow=overflow)
    second = LossScaler(1.0, True, 3, 2)
    second.load_state_dict(first.state_dict())
    for overflow in events[4:]:
        second.update(overflow=overflow)
    assert second == whole
