"""Reading a model: names, ties, strides, dtypes, and what cannot lie in a flat buffer."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shardline.errors import ConfigError, ModelError
from shardline.plan.describe import blocks, chosen_units, describe_modules, describe_params, first_names
from shardline.sharding.precision import Precision
from tests.models import Block, ConvNet, Mlp, TinyGpt


def specs_of(model: nn.Module, precision: Precision | None = None, frozen: tuple[str, ...] = ()):
    groups = {name: 0 for name, _ in model.named_parameters() if name not in frozen}
    return {spec.name: spec for spec in describe_params(model, precision or Precision(), groups)[0]}


def test_ties_have_all_their_names() -> None:
    model = TinyGpt()
    names = first_names(model)
    assert names[model.embed.weight] == ("embed.weight", "head.weight")
    assert [each[0] for each in names.values()] == [name for name, _ in model.named_parameters()]


def test_shapes_dtypes_and_trainability() -> None:
    model = ConvNet()
    model.conv1.weight.requires_grad_(False)
    specs = specs_of(model, Precision(compute=torch.bfloat16), frozen=("head.bias",))
    assert {name: spec.shape for name, spec in specs.items()} == {
        n: tuple(p.shape) for n, p in model.named_parameters()
    }
    assert [name for name, spec in specs.items() if not spec.trainable] == ["conv1.weight", "head.bias"]
    assert {name for name, spec in specs.items() if spec.dtype is torch.float32} == {
        "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"
    }  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(0, 4), max_size=4), order=st.randoms())
def test_strides_fill_one_range_and_keep_a_dense_order(shape, order) -> None:
    """Any permutation of a contiguous tensor is kept as it is: (offset of element 0, then each element once)."""
    dims = list(range(len(shape)))
    order.shuffle(dims)
    value = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape).permute(dims)
    (spec,) = specs_of(nn.ParameterList([nn.Parameter(value)])).values()
    flat = torch.empty(spec.numel)
    shown = flat.as_strided(spec.shape, spec.stride)
    shown.copy_(value)
    assert torch.equal(shown, value)
    assert sorted(flat.tolist()) == sorted(value.flatten().tolist())
    if value.numel() and all(size > 1 for size in value.shape):
        assert spec.stride == value.stride()


@pytest.mark.parametrize(
    "value", [torch.randn(4, 8)[:, ::2], torch.ones(1).expand(6), torch.randn(9).as_strided((3, 3), (2, 1))]
)
def test_strides_that_leave_holes_or_overlap_become_dense(value) -> None:
    (spec,) = specs_of(nn.ParameterList([nn.Parameter(value)])).values()
    assert spec.stride == torch.empty(spec.shape).stride()


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (nn.Sequential(nn.LazyLinear(4)), "lazy"),
        (nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.complex64))]), "complex"),
        (nn.ParameterList([nn.Parameter(torch.eye(2).to_sparse())]), "sparse"),
    ],
)
def test_what_cannot_lie_in_a_flat_buffer_is_named(model, word) -> None:
    with pytest.raises(ModelError, match=r"parameter '0") as raised:
        specs_of(model) if word != "lazy" else describe_params(model, Precision(), {})
    assert word in str(raised.value)


def test_modules_are_listed_once_with_their_own_parameters() -> None:
    model = TinyGpt()
    modules = {module.path: module for module in describe_modules(model)}
    assert list(modules) == [path for path, _ in model.named_modules()]
    assert modules[""].params == ("position",) and modules["head"].params == ("embed.weight",)
    assert modules["blocks"].repeats and not modules["blocks.0"].repeats and modules["blocks.0"].kind == "GptBlock"


def test_absent_parameters_are_skipped() -> None:
    assert describe_modules(nn.Linear(2, 2, bias=False))[0].params == ("weight",)


def test_units_are_chosen_by_class_name_path_or_ending() -> None:
    modules = describe_modules(Mlp(depth=2))
    assert chosen_units(modules, ["Block"], [], []) == ["blocks.0", "blocks.1"]
    assert chosen_units(modules, [], ["head", "blocks"], []) == ["blocks", "head"]
    assert chosen_units(modules, [], [], [".up", "1.down"]) == ["blocks.0.up", "blocks.1.up", "blocks.1.down"]
    assert chosen_units(modules, [], [], []) == []


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (
            (["Blok"], [], []),
            r"leaf_module\.classes names 'Blok', which matches no parameter .* did you mean 'Block'\?",
        ),
        ((["GELU"], [], []), r"classes names 'GELU', which matches no parameter"),
        (([], ["block"], []), r"leaf_module\.names names 'block', .* did you mean 'blocks'\?"),
        (([], [], ["block"]), r"leaf_module\.name_suffixes names 'block', .* did you mean 'blocks'\?"),
    ],
)
def test_a_unit_that_no_module_is_refused_with_the_nearest(chosen, said) -> None:
    modules = describe_modules(nn.Sequential(Mlp(depth=2), nn.GELU()))
    with pytest.raises(ConfigError, match=said):
        chosen_units(describe_modules(Mlp(depth=2)) if chosen[1] else modules, *chosen)


@pytest.mark.parametrize(
    ("wanted", "in_fp32"),
    [
        ({"LayerNorm": "fp32"}, r".*norm.*"),
        ({"GptBlock": "fp32"}, r"blocks\..*"),
        ({"blocks": "fp32"}, r"blocks\..*"),
        ({"blocks.1": "fp32"}, r"blocks\.1\..*"),
        ({"blocks.1.up.bias": "fp32"}, r"blocks\.1\.up\.bias"),
        ({"up": "fp32"}, r"blocks\..\.up\..*"),
        ({"up.bias": "fp32"}, r"blocks\..\.up\.bias"),
        ({"norm": "fp32"}, r"norm\..*"),  # a full name: not the ends of others
        ({"head": "fp32"}, r"embed\.weight"),  # tied
        ({"position": "fp32"}, r"position"),
        ({"TinyGpt": "fp32", "blocks": "bf16", "blocks.0.up": "fp32"}, r"(?!blocks).*|blocks\.0\.up\..*"),
        ({"blocks": "fp32", "Linear": "bf16"}, r"blocks\..\.norm.*"),
    ],
)
def test_dtypes_by_name_or_class_hold_for_all_below(wanted, in_fp32) -> None:
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    precision = Precision(compute=torch.bfloat16, modules={name: dtypes[dtype] for name, dtype in wanted.items()})
    specs = specs_of(TinyGpt(), precision)
    found = [name for name, spec in specs.items() if spec.dtype is torch.float32]
    assert found == [name for name in specs if re.fullmatch(in_fp32, name)]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("LayerNorms", "LayerNorm"), ("block.1", "blocks.1"), ("heads", "head"), ("blocks.0.u", "blocks.0.up"), ("x", "")],
)
def test_a_dtype_of_nothing_is_refused_with_the_nearest(name, nearest) -> None:
    with pytest.raises(ConfigError, match=f"module_dtypes names '{name}', which matches no parameter") as raised:
        specs_of(TinyGpt(), Precision(modules={"embed": torch.float32, name: torch.float32}))
    assert f"did you mean '{nearest}" in str(raised.value) or not nearest


def test_blocks_are_the_outermost_repeated_modules() -> None:
    nested = nn.ModuleList(nn.Sequential(Block(2), Block(2)) for _ in range(2))  # a list of stages of blocks
    experts = nn.Sequential(nn.ModuleDict({"experts": nn.ModuleList([Block(2), Block(2)])}), nn.ReLU())
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    small = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2))
    assert blocks(TinyGpt()) == ["blocks.0", "blocks.1"]
    assert blocks(nested) == ["0.0", "0.1", "1.0", "1.1"]
    assert blocks(experts) == ["0"]
    assert blocks(plain) == [] and blocks(Block(2)) == []
    assert blocks(small) == ["0", "1"]
    assert blocks(nn.ModuleList([nested[0][0]] * 2)) == ["0"]
