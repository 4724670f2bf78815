"""What is left, what stays, and what is there again afterwards."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from shardline.runtime.modes import is_recorded, keep, outside_modes


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


def product():
    return torch.ones(2, 2) @ torch.ones(2, 2)


own = outside_modes(product)


def modes_here():
    return (
        [torch._C._get_dispatch_stack_at(i) for i in range(torch._C._len_torch_dispatch_stack())],
        [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())],
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch._C._functorch.get_dynamic_layer_stack_depth(),
    )


@pytest.mark.parametrize("kind", [Dispatched, Called])
def test_stacked_modes_are_left_and_entered_again(kind) -> None:
    with kind() as a, kind() as b:
        before = modes_here()
        a.seen = b.seen = 0
        own()
        assert (a.seen, b.seen) == (0, 0) and modes_here() == before
        product()
        assert a.seen and b.seen


def test_autocast_device_and_inference_mode() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert own().dtype is torch.float32 and product().dtype is torch.bfloat16
    with torch.device("meta"):
        assert own().device.type == "cpu" and product().device.type == "meta"
    with torch.inference_mode():
        before = modes_here()
        made, with_grad = outside_modes(lambda: (product(), torch.is_grad_enabled()))()
        assert not made.is_inference() and not with_grad and modes_here() == before
        assert product().is_inference()


@pytest.mark.parametrize("with_grad", [True, False])
def test_gradients_stay_as_they_are(with_grad) -> None:
    with torch.set_grad_enabled(with_grad), Dispatched():
        assert outside_modes(torch.is_grad_enabled)() is with_grad


def test_levels_of_transforms() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    inside = []

    @outside_modes
    def change():
        weight.data = torch.full((2, 2), 3.0)
        inside.append(modes_here()[-1])

    def loss(x):
        before = modes_here()
        change()
        assert modes_here() == before
        return (x @ weight).sum()

    x = torch.ones(3, 2, 2)
    assert torch.equal(torch.func.vmap(torch.func.grad(loss))(x), torch.full((3, 2, 2), 6.0))
    assert torch.func.jvp(loss, (x[0],), (x[0],))[1] == 24.0
    assert inside == [0, 0]


def test_what_is_recorded_outside_of_all_transforms() -> None:
    seen = []

    def loss(x):
        seen.append(is_recorded())
        return x.sum()

    x = torch.ones(2)
    torch.func.grad(loss)(x)
    torch.func.jacrev(torch.func.grad(loss))(x)
    torch.func.vmap(loss)(x)
    torch.func.jvp(loss, (x,), (x,))
    with torch.no_grad():
        torch.func.grad(loss)(x)
        torch.func.vmap(torch.func.grad(loss))(torch.ones(2, 2))
        torch.func.vmap(loss)(x)
    torch.func.grad(torch.no_grad()(loss))(x)
    assert seen == [True] * 4 + [False] * 4


def test_an_error_leaves_the_modes_as_they_were() -> None:
    @outside_modes
    def fail():
        raise ValueError("on purpose")

    with Dispatched() as mode, Called(), torch.autocast("cpu"), torch.inference_mode():
        before = modes_here()
        with pytest.raises(ValueError, match="on purpose"):
            fail()
        assert modes_here() == before
        product()
        assert mode.seen


def test_what_the_engine_entered_stays() -> None:
    with Dispatched() as outer, keep(FakeTensorMode()), Dispatched() as inner:
        outer.seen = inner.seen = 0
        assert isinstance(own(), FakeTensor)
        assert (outer.seen, inner.seen) == (0, 0)
    with keep(FlopCounterMode(display=False)) as flops, Dispatched() as mode:
        own()
        assert flops.get_total_flops() == 16 and not mode.seen
    with keep(torch.device("meta")), Called() as mode:
        made = own()
        assert not mode.seen
    assert made.device.type == "meta"
    with FakeTensorMode():
        assert not isinstance(own(), FakeTensor)


def test_a_mode_entered_by_others_inside_of_a_kept_one_is_left() -> None:
    with keep(Dispatched()) as kept, Dispatched() as theirs:
        kept.seen = theirs.seen = 0
        own()
        assert kept.seen and not theirs.seen
    kept.seen = 0
    with kept:  # now the user's
        own()
    assert not kept.seen
