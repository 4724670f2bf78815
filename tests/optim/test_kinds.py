"""The list and the probe: they agree on torch's classes, and the probe tells home-made optimizers apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from shardline.errors import OptimizerError
from shardline.optim import kind, lr
from shardline.optim.kinds import KNOWN, REFUSED, probe


def test_every_class_of_torch_is_in_the_list() -> None:
    theirs = {one for one in vars(torch.optim).values() if isinstance(one, type) and issubclass(one, Optimizer)}
    assert theirs - {Optimizer} <= set(KNOWN) | set(REFUSED)


@pytest.mark.parametrize("cls", KNOWN, ids=lambda cls: cls.__name__)
def test_list_and_probe_agree(cls: type[Optimizer]) -> None:
    assert probe(cls, {}, [{}]) == KNOWN[cls] == kind(cls)


@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
def test_list_and_probe_refuse_alike(cls: type[Optimizer]) -> None:
    with pytest.raises(OptimizerError, match=f"{cls.__name__} cannot be used"):
        kind(cls)
    with pytest.raises(OptimizerError, match=cls.__name__):
        probe(cls, {}, [{}])


@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True},
        {"foreach": True},
        {"fused": True},
        {"capturable": True},
        {"maximize": True},
        {"lr": torch.tensor(1e-3)},
    ],
)
def test_how_torch_computes_is_no_matter(options: dict[str, Any]) -> None:
    assert probe(Adam, options, [{}]) == "elementwise"


class Descent(Optimizer):
    """Plain descent along ``direction(grad)``; the base of the home-made ones."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1, **more: Any) -> None:
        super().__init__(params, {"lr": lr, **more})

    def direction(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        assert param.grad is not None
        return param.grad

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(self.direction(param, group), alpha=group["lr"])


class Signed(Descent):
    def direction(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        moment = self.state[param].setdefault("moment", torch.zeros_like(param))
        return moment.lerp_(super().direction(param, group), 0.1).sign()


class Blockwise(Descent):
    """Keeps its momentum in 8 bits by blocks of 256, and small tensors in full, as 8-bit optimizers do."""

    def direction(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        moment = self.state[param].setdefault("moment", torch.zeros_like(param))
        moment.lerp_(super().direction(param, group), 0.1)
        if param.numel() >= 4096:
            blocks = moment.view(-1, 256)
            largest = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
            blocks.copy_((blocks / largest * 127).round() * largest / 127)
        return moment


class Rowwise(Descent):
    """One second moment per row, as Adafactor's."""

    def direction(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        grad = super().direction(param, group)
        return grad / grad.square().mean(dim=-1, keepdim=True).sqrt()


class Clipped(Descent):
    """Limits an update by its root mean square: elementwise until a gradient is large."""

    def direction(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        grad = super().direction(param, group)
        return grad / max(1.0, grad.square().mean().sqrt().item() / 20)


class MatricesOnly(Descent):
    def direction(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        if param.ndim != 2:
            raise ValueError("matrices only")
        return super().direction(param, group)


class Adaptive(Descent):
    """Estimates one step size from all gradients, as Prodigy and D-Adaptation."""

    distance = 1e-6

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        params = [param for group in self.param_groups for param in group["params"]]
        norm = math.sqrt(sum(param.grad.square().sum().item() for param in params))
        self.distance = max(self.distance, self.distance * (1 + 1 / (1 + norm)))
        for group in self.param_groups:
            group["lr"] = self.distance
        super().step()


class Noisy(Descent):
    def direction(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        return super().direction(param, group) + torch.rand_like(param)


class Switched(Descent):
    """Matrix or elementwise update by an option of the group, as Muon with an auxiliary Adam."""

    def direction(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        grad = super().direction(param, group)
        return grad / grad.norm() if group["use_norm"] else grad


class NeedsClosure(Descent):
    def step(self, closure: Callable[[], float]) -> None:  # type: ignore[override]
        closure()


class AsksForClosure(Descent):
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is None:
            raise RuntimeError("a closure is required")


class Wrapper(Descent):
    def __init__(self, params: Iterable[Any], base: Optimizer) -> None:
        super().__init__(params)


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (Descent, "elementwise"),
        (Signed, "elementwise"),
        (Blockwise, "per_parameter"),
        (Rowwise, "per_parameter"),
        (Clipped, "per_parameter"),
        (MatricesOnly, "per_parameter"),
        (Adaptive, "global"),
        (Noisy, "global"),
    ],
)
def test_the_probe_tells_apart(cls: type[Optimizer], expected: str) -> None:
    assert kind(cls) == expected
    assert kind(cls([torch.ones(3, requires_grad=True)], lr=1e-4)) == expected


def test_the_widest_of_the_groups_counts() -> None:
    def made(*options: bool) -> Optimizer:
        return Switched([{"params": [torch.ones(3, requires_grad=True)], "use_norm": option} for option in options])

    assert kind(made(False, False)) == "elementwise"
    assert kind(made(False, True)) == "per_parameter"


def test_a_schedule_that_set_the_rate_to_zero_hides_nothing() -> None:
    optimizer = Rowwise([torch.ones(3, requires_grad=True)], lr=0.1)
    scheduler: LRScheduler = lr.WarmupLR(optimizer)
    assert scheduler.get_last_lr() == [0.0]
    assert kind(optimizer) == "per_parameter"


def test_a_subclass_of_a_known_one_is_probed_again() -> None:
    class Projected(AdamW):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()
            for param in self.param_groups[0]["params"]:
                param.div_(param.norm())

    assert kind(Projected([torch.ones(3, requires_grad=True)])) == "per_parameter"


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (NeedsClosure, "NeedsClosure cannot be used: its step needs a closure"),
        (AsksForClosure, "AsksForClosure is not known, and .* RuntimeError: a closure is required.* shardline_kind"),
        (Wrapper, "Wrapper is not known, and .* TypeError: .*'base'.* shardline_kind"),
    ],
)
def test_what_cannot_be_tried_is_refused(cls: type[Optimizer], message: str) -> None:
    with pytest.raises(OptimizerError, match=message):
        kind(cls)


def test_a_stated_kind_is_believed() -> None:
    class Stated(Wrapper):
        shardline_kind = "elementwise"

    class Misspelt(Wrapper):
        shardline_kind = "element-wise"

    assert kind(Stated) == "elementwise"
    with pytest.raises(OptimizerError, match="shardline_kind is 'element-wise'; it must be"):
        kind(Misspelt)


def test_the_probe_leaves_the_users_things_alone() -> None:
    param = torch.ones(3, requires_grad=True)
    optimizer = Noisy([param], lr=0.1)
    before = torch.get_rng_state()
    kind(optimizer)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(param, torch.ones(3))
    assert param.grad is None
    assert not optimizer.state
