"""What stands for a gradient between backward and step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardline.errors import UsageError
from shardline.sharding.gradient import GuardedGrad, collect_grads, drop_grads, gradient_error, has_grads


def test_gradients_are_taken_from_parameters() -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    assert not has_grads(params) and collect_grads(params) == [None, None, None]
    (params[0].sum() * 2).backward()
    assert has_grads(params)
    first, *others = collect_grads(params)
    assert first.tolist() == [2, 2] and others == [None, None] and not has_grads(params)
    params[1].sum().backward()
    drop_grads(params)
    assert all(param.grad is None for param in params)


def holding(read, unscaled=False):
    param = torch.zeros(4)
    param.grad = GuardedGrad.stand_for(param, read, lambda: unscaled)
    return param


def test_a_whole_gradient_is_read_and_changed_in_its_place() -> None:
    grad = torch.tensor([3.0, 4.0, 0.0, 0.0])
    param = holding(lambda operation: grad)
    assert float(torch.nn.utils.clip_grad_norm_([param], 1.0)) == 5.0
    torch.testing.assert_close(grad, torch.tensor([0.6, 0.8, 0.0, 0.0]))
    torch.nn.utils.clip_grad_value_([param], 0.7)
    assert grad.tolist() == pytest.approx([0.6, 0.7, 0, 0])
    param.grad.zero_()
    assert not grad.any()


def test_another_raises_with_what_to_call() -> None:
    def refuse(operation):
        raise gradient_error("parameter 'net.w'", operation)

    param = holding(refuse)
    assert param.grad is not None and param.grad.shape == (4,) and param.grad.dtype is torch.float32
    assert "collected" in repr(param.grad)
    for use in (
        lambda: param.grad.norm(),
        lambda: param.grad + 1,
        lambda: param.grad.tolist(),
        lambda: torch.cat([param.grad, param.grad]),
        lambda: torch.nn.utils.clip_grad_norm_([param], 1.0),
        lambda: torch.nn.utils.clip_grad_value_([param], 1.0),
        lambda: param.grad.mul_(2),
        lambda: float(param.grad[0]),
    ):
        with pytest.raises(UsageError, match=r"collected the gradient of .*'net.w'.*gradient_clipping.*before_step"):
            use()


def test_a_scaler_divides_nothing_whose_scale_was_taken_out() -> None:
    grad = torch.ones(4)
    for unscaled, expected in ((True, 1.0), (False, 0.5)):
        param = holding(lambda operation: grad, unscaled)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        scaler.scale(torch.ones(()))
        optimizer = torch.optim.SGD([param], lr=0.1)
        scaler.unscale_(optimizer)
        assert bool((grad == expected).all())
