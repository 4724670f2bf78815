"""Names and parameters of a configuration: which class, which meaning, which errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, Optimizer, RMSprop

from shardline.errors import ConfigError
from shardline.optim import Lamb, Lion, MuonAdamW, build


def groups() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"params": [torch.randn(64, generator=generator).requires_grad_()]},
        {"params": [torch.randn(3, generator=generator).requires_grad_()], "lr": 0.5, "weight_decay": 0.25},
    ]


def trained(optimizer: Optimizer) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(3):
        for p in params:
            p.grad = torch.cos(p.detach() + step)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize(
    ("name", "params", "reference"),
    [
        ("Adam", {"lr": 0.1, "weight_decay": 0.1}, lambda g: AdamW(g, lr=0.1, weight_decay=0.1)),
        ("adam", {"adam_w_mode": True}, lambda g: AdamW(g, weight_decay=0.0)),
        ("Adam", {"weight_decay": 0.1, "adam_w_mode": False}, lambda g: Adam(g, weight_decay=0.1)),
        ("ADAMW", {"weight_decay": 0.1, "adam_w_mode": False}, lambda g: AdamW(g, weight_decay=0.1)),
        ("AdamW", None, lambda g: AdamW(g, weight_decay=0.0)),
        ("AdamW", {"betas": [0, 0.9], "eps": 1, "amsgrad": True, "torch_adam": True, "bias_correction": True}, None),
        ("SGD", {"lr": 0.1, "momentum": 0.9}, lambda g: SGD(g, lr=0.1, momentum=0.9)),
        ("adagrad", {"lr": 0.1}, lambda g: Adagrad(g, lr=0.1)),
        ("lion", {"lr": 0.1}, lambda g: Lion(g, lr=0.1)),
        ("Lamb", {"lr": 0.1, "max_coeff": 2.0, "amsgrad": False}, lambda g: Lamb(g, lr=0.1, max_coeff=2.0)),
        ("muon", {"lr": 0.1, "ns_method": "gram"}, lambda g: MuonAdamW(g, lr=0.1)),
        ("RMSprop", {"lr": 0.1, "alpha": 0.5}, lambda g: RMSprop(g, lr=0.1, alpha=0.5)),
        ("Adadelta", {}, lambda g: Adadelta(g)),
    ],
)
def test_a_name_means_what_deepspeed_or_torch_mean(name: str, params: Any, reference: Any) -> None:
    made = build(name, params, groups())
    expected = (reference or (lambda g: AdamW(g, betas=(0.0, 0.9), eps=1, weight_decay=0.0, amsgrad=True)))(groups())
    assert type(made) is type(expected)
    for mine, theirs in zip(made.param_groups, expected.param_groups, strict=True):
        assert mine["lr"] == theirs["lr"]
        assert mine["weight_decay"] == theirs["weight_decay"]
    for p, q in zip(trained(made), trained(expected), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_fused_where_every_tensor_allows_it(name: str) -> None:
    def fused(params: dict[str, Any], *tensors: Tensor) -> list[Any]:
        return [group["fused"] for group in build(name, params, [{"params": [t]} for t in tensors]).param_groups]

    one, half = torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    assert fused({}, one, half) == [True, True]
    assert fused({"foreach": None, "fused": None}, one) == [True]
    assert not any(fused({"fused": False}, one))
    assert not any(fused({"foreach": True}, one))
    assert not any(fused({"differentiable": True}, one))
    assert not any(fused({}, one, torch.ones(2, dtype=torch.complex64, requires_grad=True)))
    assert not any(fused({}, one, torch.ones(2, device="meta", requires_grad=True)))


def test_an_empty_group_is_a_group() -> None:
    made = build("AdamW", {}, [{"params": []}, *groups()])
    trained(made)
    assert len(made.param_groups) == 3


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("AdamV", {}, "optimizer.type is 'AdamV', which is not a known optimizer. Did you mean 'Adam"),
        ("rmsprop", {}, "Did you mean 'RMSprop'"),
        ("Optimizer", {}, "not a known optimizer"),
        ("lr_scheduler", {}, "not a known optimizer"),
        ("onebitadam", {}, "one of DeepSpeed's and not supported. Use: Adam, AdamW, SGD"),
        ("Adam", {"weigth_decay": 0.1}, "optimizer Adam has no parameter 'weigth_decay'. Did you mean 'weight_decay'"),
        ("Adam", {"adamw_mode": True}, "Did you mean 'adam_w_mode'"),
        ("Lion", {"eps": 1e-8}, "optimizer Lion has no parameter 'eps'. It takes: betas, lr, weight_decay."),
        ("SGD", {"torch_adam": True}, "optimizer SGD has no parameter 'torch_adam'"),
        ("Adam", {"max_grad_norm": 1.0}, "set gradient_clipping"),
        ("AdamW", {"bias_correction": False}, "bias_correction is False; for AdamW only True is supported"),
        ("Adam", {"fp32_optimizer_states": False}, "fp32_optimizer_states is False; for Adam only True"),
        ("Lamb", {"amsgrad": True}, "amsgrad is True; for Lamb only False"),
        ("AdamW", {"lr": -1.0}, "optimizer AdamW cannot be built .*: Invalid learning rate"),
        ("AdamW", {"lr": "1e-3"}, "optimizer AdamW cannot be built"),
        ("Lion", {"betas": [0.9, 1.5]}, r"optimizer Lion: betas is \(0.9, 1.5\); it must be two numbers"),
        ("Muon", {"muon_lr": -1.0}, "optimizer Muon cannot be built .*Learning rate"),
        ("muon", {"per_head_muon": True}, "per_head_muon is True; for muon only False is supported"),
    ],
)
def test_what_cannot_be_built_says_why(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, params, groups())


def test_the_given_params_are_left_as_they_are() -> None:
    params = {"adam_w_mode": False, "betas": [0.9, 0.99]}
    build("Adam", params, [{"params": [nn.Parameter(torch.ones(1))]}])
    assert params == {"adam_w_mode": False, "betas": [0.9, 0.99]}
