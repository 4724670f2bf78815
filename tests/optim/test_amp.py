"""Unscaling and skipping inside the step, against plain steps on unscaled gradients and torch's GradScaler."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from shardline.optim import Lamb, Lion, prepare, takes_grad_scale
from shardline.optim.amp import FUSED

Make = Callable[..., Optimizer]

MAKERS: dict[str, Make] = {
    "Lion": lambda p: Lion(p, lr=0.01, weight_decay=0.1),
    "Lamb": lambda p: Lamb(p, lr=0.01, weight_decay=0.1),
    "Adam": lambda p, fused=True: Adam(p, lr=0.01, weight_decay=0.1, fused=fused),
    "AdamW": lambda p, fused=True: AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True, fused=fused),
    "SGD": lambda p, fused=True: SGD(p, lr=0.01, fused=fused),
    "SGD momentum": lambda p, fused=True: SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1, fused=fused),
    "SGD nesterov": lambda p, fused=True: SGD(p, lr=0.01, momentum=0.9, nesterov=True, fused=fused),
    "Adagrad": lambda p, fused=True: Adagrad(p, lr=0.01, fused=fused),
}
SCALE = 1024.0


def tensors(device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator).to(device).requires_grad_() for n in (64, 3)]


def grads(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(n, generator=generator) for n in (64, 3)]


def plain(make: Make, steps: list[int], **options: Any) -> tuple[list[Tensor], Optimizer]:
    """The steps with ordinary gradients."""
    params = tensors()
    optimizer = make(params, **options)
    for step in steps:
        for p, g in zip(params, grads(step), strict=True):
            p.grad = g
        optimizer.step()
    return params, optimizer


def scaled(
    make: Make, steps: list[int], overflows: list[int], device: str = "cpu", bad: float = math.nan
) -> tuple[list[Tensor], Optimizer]:
    """The steps with scaled gradients; those in ``overflows`` hold a NaN or an infinity and found_inf says so."""
    params = tensors(device)
    optimizer = make(params)
    assert takes_grad_scale(optimizer)
    prepare(optimizer)
    optimizer.grad_scale = torch.tensor(SCALE, device=device)  # type: ignore[attr-defined]
    for step in steps:
        for p, g in zip(params, grads(step), strict=True):
            p.grad = (g * SCALE).to(device)
            p.grad[1] = bad if step in overflows else p.grad[1]
        optimizer.found_inf = torch.tensor(float(step in overflows), device=device)  # type: ignore[attr-defined]
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("overflows", [[], [0], [0, 1], [2], [1, 4]])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_skipped_steps_never_happened(name: str, overflows: list[int], bad: float) -> None:
    params, optimizer = scaled(MAKERS[name], [0, 1, 2, 3, 4], overflows, bad=bad)
    expected, reference = plain(MAKERS[name], [step for step in range(5) if step not in overflows])
    for p, q in zip(params, expected, strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == reference.state[q].keys()
        for key, value in reference.state[q].items():
            assert torch.equal(optimizer.state[p][key], value), key


@pytest.mark.parametrize("name", MAKERS)
def test_a_first_step_that_is_skipped_leaves_nothing_undefined(name: str) -> None:
    params, optimizer = scaled(MAKERS[name], [0], [0])
    for p, start in zip(params, tensors(), strict=True):
        assert torch.equal(p, start)
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, torch.zeros_like(value)), key


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_are_written_back_unscaled(name: str) -> None:
    params, _ = scaled(MAKERS[name], [0], [])
    for p, g in zip(params, grads(0), strict=True):
        assert torch.equal(p.grad, g)  # the scale is a power of two


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("Lion", "Lamb")])
def test_fused_is_the_ordinary_formula(name: str) -> None:
    steps = list(range(5))
    for p, q in zip(plain(MAKERS[name], steps)[0], plain(MAKERS[name], steps, fused=False)[0], strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", ["Lion", "Lamb"])
def test_torchs_grad_scaler_drives_them(name: str) -> None:
    start = torch.ones(4, requires_grad=True)
    optimizer = MAKERS[name]([start])
    twin = copy.deepcopy(start)
    reference = MAKERS[name]([twin])
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=100)
    for factor in (math.inf, 1.0, 2.0, math.inf, 3.0):
        optimizer.zero_grad()
        scaler.scale((start * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if math.isfinite(factor):
            twin.grad = torch.full_like(twin, factor)
            reference.step()
    assert torch.equal(start, twin)
    assert not torch.equal(start, torch.ones(4))
    assert scaler.get_scale() == SCALE / 4


def test_found_inf_without_grad_scale_and_the_other_way_round() -> None:
    p = torch.ones(2, requires_grad=True)
    optimizer = Lion([p], lr=0.5, betas=(0.5, 0.5))
    optimizer.grad_scale = torch.tensor([4.0])
    p.grad = torch.full((2,), 8.0)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].tolist() == [1.0, 1.0]
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor([1.0])
    p.grad = torch.full((2,), math.nan)
    optimizer.step()
    assert p.tolist() == [0.5, 0.5]
    assert optimizer.state[p]["exp_avg"].tolist() == [1.0, 1.0]


def test_who_takes_grad_scale() -> None:
    def sgd(**options: Any) -> Optimizer:
        return SGD(tensors(), **options)

    assert takes_grad_scale(sgd(fused=True, momentum=0.9))
    assert takes_grad_scale(sgd(fused=True, dampening=0.5))
    assert not takes_grad_scale(sgd(fused=True, momentum=0.9, dampening=0.5))
    assert not takes_grad_scale(sgd(momentum=0.9))
    assert not takes_grad_scale(AdamW(tensors()))
    assert not takes_grad_scale(RMSprop(tensors()))

    first, second = tensors()
    assert not takes_grad_scale(AdamW([{"params": [first]}, {"params": [second], "fused": False}], fused=True))

    class Mine(AdamW):
        pass

    assert not takes_grad_scale(Mine(tensors(), fused=True))

    hooked = AdamW(tensors(), fused=True)
    handle = hooked.register_step_pre_hook(lambda *_: None)
    assert not takes_grad_scale(hooked)
    handle.remove()
    assert takes_grad_scale(hooked)


def test_prepare_keeps_what_is_there_and_touches_nobody_else() -> None:
    params, optimizer = plain(MAKERS["SGD momentum"], [0, 1])
    before = [optimizer.state[p]["momentum_buffer"].clone() for p in params]
    late = torch.ones(2, requires_grad=True)
    optimizer.add_param_group({"params": [late]})
    prepare(optimizer)
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], b) for p, b in zip(params, before, strict=True))
    assert torch.equal(optimizer.state[late]["momentum_buffer"], torch.zeros(2))

    first, second = tensors()
    adagrad = Adagrad([first], initial_accumulator_value=0.5)
    adagrad.add_param_group({"params": [second]})
    prepare(adagrad)
    assert torch.equal(adagrad.state[second]["sum"], torch.full((3,), 0.5))
    assert adagrad.state[second]["step"].item() == 0.0

    for other in (AdamW(tensors(), fused=True), SGD(tensors(), fused=True), SGD(tensors(), momentum=0.9)):
        prepare(other)
        assert not other.state


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("name", MAKERS)
def test_an_accelerator_skips_without_asking_the_host(name: str) -> None:
    expected, optimizer = plain(MAKERS[name], [0, 2])
    if "cuda" not in FUSED.get(type(optimizer), {"cuda"}):
        pytest.skip(f"torch {torch.__version__} has no fused kernel of it for CUDA")
    scaled(MAKERS[name], [0], [], "cuda")  # warm up
    params = [p.detach().clone().requires_grad_() for p in tensors("cuda")]
    optimizer = MAKERS[name](params)
    prepare(optimizer)
    given = [[(g * SCALE).cuda() for g in grads(step)] for step in range(3)]
    given[1][0][1] = math.nan
    found = [torch.tensor(float(step == 1), device="cuda") for step in range(3)]
    optimizer.grad_scale = torch.tensor(SCALE, device="cuda")  # type: ignore[attr-defined]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3):
            for p, g in zip(params, given[step], strict=True):
                p.grad = g
            optimizer.found_inf = found[step]  # type: ignore[attr-defined]
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach())
