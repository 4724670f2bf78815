"""Muon and AdamW in one: which parameter goes where, and the bits of torch's own two."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Muon

from shardline.errors import ConfigError
from shardline.optim import MuonAdamW, kind
from shardline.optim.muon import split_groups
from tests.models import Branches, ConvNet, Lora, TinyGpt


def tensors() -> tuple[list[Tensor], list[Tensor]]:
    """Matrices, and others."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    return [made(4, 6), made(9, 3)], [made(5), made(7, 4)]


def train(params: list[Tensor], *optimizers: torch.optim.Optimizer, first: int = 0, steps: int = 3) -> None:
    for step in range(first, first + steps):
        for p in params:
            p.grad = torch.cos(p.detach() + step)
        for optimizer in optimizers:
            optimizer.step()


def same(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("decoupled", [True, False])
def test_the_bits_are_those_of_torchs_two(decoupled: bool) -> None:
    hidden, rest = tensors()
    groups = [{"params": hidden, "use_muon": True}, {"params": rest[:1]}, {"params": rest[1:], "weight_decay": 0.0}]
    shared: dict[str, Any] = {"betas": (0.8, 0.9), "eps": 1e-3}
    one = MuonAdamW(groups, 0.1, adam_lr=0.01, weight_decay=0.3, momentum=0.8, adam_w_mode=decoupled, **shared)
    train(hidden + rest, one)

    theirs, others = tensors()
    plain = [{"params": others[:1], "weight_decay": 0.3}, {"params": others[1:], "weight_decay": 0.0}]
    adam = (AdamW if decoupled else Adam)(plain, lr=0.01, **shared)
    train(theirs + others, Muon(theirs, lr=0.1, weight_decay=0.3, momentum=0.8), adam)
    assert same(hidden + rest, theirs + others)
    assert kind(one) == "per_parameter"


def test_rates_and_the_options_of_a_half() -> None:
    def rates(group: dict[str, Any], **params: Any) -> list[float]:
        hidden, rest = tensors()
        halves = [{**group, "params": hidden, "use_muon": True}, {**group, "params": rest, "use_muon": False}]
        return [made["lr"] for made in MuonAdamW(halves, **params).param_groups]

    assert rates({}) == [0.02, 3e-4]
    assert rates({}, lr=0.1) == [0.1, 0.1]
    assert rates({}, lr=0.1, adam_lr=0.2) == [0.1, 0.2]
    assert rates({"lr": 0.3}, lr=0.1, muon_lr=0.2) == [0.3, 0.3]
    assert rates({"lr": 0.3, "muon_lr": 0.4}, muon_lr=0.2) == [0.4, 0.3]

    hidden, rest = tensors()
    group = {"momentum": 0.5, "betas": (0.1, 0.2), "eps": 1e-3, "weight_decay": 0.7, "name": "all"}
    made = MuonAdamW([{**group, "params": hidden, "use_muon": True}, {**group, "params": rest}])
    muon, adam = made.param_groups
    assert (muon["momentum"], muon["weight_decay"], muon["name"]) == (0.5, 0.7, "all")
    assert (adam["betas"], adam["eps"], adam["weight_decay"], adam["name"]) == ((0.1, 0.2), 1e-3, 0.7, "all")
    assert "betas" not in muon and "momentum" not in adam and muon["eps"] == Muon(hidden).defaults["eps"]


def test_a_copy_and_a_state_dict_go_on_alike() -> None:
    hidden, rest = tensors()
    one = MuonAdamW([{"params": hidden, "use_muon": True}, {"params": rest}], lr=0.1)
    train(hidden + rest, one)
    copied = copy.deepcopy(one)
    theirs = [p for group in copied.param_groups for p in group["params"]]
    loaded = [p.detach().clone().requires_grad_() for p in hidden + rest]
    other = MuonAdamW([{"params": loaded[:2], "use_muon": True}, {"params": loaded[2:]}], lr=9.0)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    train(hidden + rest, one, first=3)
    train(theirs, copied, first=3)
    train(loaded, other, first=3)
    assert same(hidden + rest, theirs) and same(hidden + rest, loaded)
    copied.add_param_group({"params": [torch.ones(2, 2, requires_grad=True)], "use_muon": True})
    assert copied.param_groups[-1]["momentum"] == 0.95


def test_a_group_of_muon_holds_matrices_only() -> None:
    hidden, rest = tensors()
    one = MuonAdamW([{"params": hidden, "use_muon": True}])
    with pytest.raises(ConfigError, match=r"shape \(5,\), and Muon takes matrices only.*use_muon = False"):
        one.add_param_group({"params": rest, "use_muon": True})
    assert len(one.param_groups) == 1
    one.add_param_group({"params": rest})
    assert [group["use_muon"] for group in one.param_groups] == [True, False]


# --- the split --------------------------------------------------------------------------------------------------------


class Biased(nn.Module):
    """Blocks with a table of their own (relative positions), and a matrix that an embedding shares."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.block() for _ in range(2))
        self.head = nn.Linear(4, 4)
        self.table = nn.Embedding(4, 4)
        self.table.weight = self.blocks[0]["tied"].weight

    def block(self) -> nn.ModuleDict:
        parts = {"mix": nn.Linear(4, 4), "position": nn.Embedding(8, 4), "tied": nn.Linear(4, 4, bias=False)}
        return nn.ModuleDict({**parts, "conv": nn.Conv1d(4, 4, 3)})


def by_muon(model: nn.Module, *groups: dict[str, Any]) -> list[list[str]]:
    """The names in each group of Muon. No parameter is lost, and its halves come in order."""
    names = {p: name for name, p in model.named_parameters()}
    given = list(groups) or [{"params": list(model.parameters())}]
    found = split_groups(model, given)
    assert sorted(names[p] for g in found for p in g["params"]) == sorted(names[p] for g in given for p in g["params"])
    return [[names[p] for p in group["params"]] for group in found if group["use_muon"]]


def test_matrices_of_blocks() -> None:
    gpt = TinyGpt()
    (found,) = by_muon(gpt)
    assert found == [name for name, p in gpt.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    assert by_muon(Biased()) == [["blocks.0.mix.weight", "blocks.1.mix.weight", "blocks.1.tied.weight"]]
    lora = Lora(width=8)
    assert all(name.endswith((".a", ".b", ".weight")) for name in by_muon(lora)[0])


def test_without_blocks_all_matrices() -> None:
    (found,) = by_muon(Branches(8))
    assert "head.weight" in found and "trunk.up.weight" in found and not any("bias" in name for name in found)
    assert by_muon(nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))) == [["1.weight"]]


def test_the_users_word_goes_first() -> None:
    gpt = TinyGpt(tied=False)
    gpt.head.weight.use_muon = True  # type: ignore[assignment]
    gpt.blocks[0].qkv.weight.use_muon = False  # type: ignore[union-attr, assignment]
    (found,) = by_muon(gpt)
    assert "head.weight" in found and "blocks.0.qkv.weight" not in found and "blocks.1.qkv.weight" in found
    block = list(gpt.blocks[1].parameters())
    matrices, others = [p for p in block if p.ndim == 2], [p for p in block if p.ndim != 2]
    groups = [{"params": matrices, "use_muon": False}, {"params": [gpt.embed.weight], "use_muon": True}]
    assert by_muon(gpt, *groups, {"params": others}) == [["embed.weight"]]


def test_groups_keep_their_order_and_options() -> None:
    gpt = TinyGpt()
    norms = {"params": list(gpt.norm.parameters()), "weight_decay": 0.0}
    parts = [{"params": list(block.parameters()), "name": str(i)} for i, block in enumerate(gpt.blocks)]
    found = split_groups(gpt, [parts[0], norms, parts[1]])
    assert [(group.get("name"), group["use_muon"]) for group in found] == [
        ("0", True), ("0", False), (None, False), ("1", True), ("1", False),
    ]  # fmt: skip
    assert found[2]["weight_decay"] == 0.0


def test_what_muon_cannot_take_is_refused() -> None:
    gpt = TinyGpt()
    with pytest.raises(ConfigError, match="nothing that is trained is a matrix in a repeated block of TinyGpt"):
        split_groups(gpt, [{"params": list(gpt.norm.parameters())}])
    gpt.norm.bias.use_muon = True  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"parameter 'norm.bias' has use_muon = True and the shape \(32,\)"):
        split_groups(gpt, [{"params": list(gpt.parameters())}])
    assert by_muon(ConvNet()) == [["head.weight"]]
