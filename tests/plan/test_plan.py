"""The plan: everything covered once, nothing overlapping, everything aligned; units where one would look for them."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from shardline.plan import ALIGNMENT, BucketPlan, ModuleSpec, ParamSpec, Plan, make_plan
from shardline.plan.describe import describe_modules, describe_params
from shardline.plan.placement import STAGES
from shardline.sharding.precision import Precision
from tests.models import Mlp, Nested, TinyGpt

# --- properties -------------------------------------------------------------------------------------------------------

SIZES = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 400)),
    st.tuples(st.integers(0, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 9)),
)


@st.composite
def models(draw: st.DrawFn) -> tuple[list[ParamSpec], list[ModuleSpec]]:
    """A list of blocks with inner leaves between leaves of the root; some parameters tied, frozen, in groups or low."""
    paths: list[tuple[str, bool]] = [("", False)]
    paths += [(f"first{i}", False) for i in range(draw(st.integers(0, 2)))]
    paths.append(("blocks", True))
    for block in range(draw(st.integers(0, 4))):
        paths.append((f"blocks.{block}", False))
        paths += [(f"blocks.{block}.leaf{i}", False) for i in range(draw(st.integers(0, 3)))]
    paths += [(f"last{i}", False) for i in range(draw(st.integers(0, 2)))]
    params: list[ParamSpec] = []
    modules: list[ModuleSpec] = []
    for path, repeats in paths:
        names = []
        for i in range(0 if repeats else draw(st.integers(0, 2))):
            if params and draw(st.integers(0, 9)) == 0:  # tied to an earlier one
                names.append(draw(st.sampled_from(params)).name)
                continue
            name = f"{path}.p{i}".lstrip(".")
            shape = draw(SIZES)
            group = draw(st.sampled_from([None, 0, 0, 0, 1, 2]))
            dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
            stride = tuple(torch.empty(shape, device="meta").stride())
            params.append(
                ParamSpec(name, (name,), shape, stride, dtype, group, state_steps=draw(st.sampled_from([0, 0, 0, 3])))
            )
            names.append(name)
        modules.append(ModuleSpec(path, "Any", repeats, tuple(dict.fromkeys(names))))
    return params, modules


PLANS = {
    "model": models(),
    "world": st.integers(1, 9),
    "low": st.sampled_from([1, 100, 1000, 100_000]),
    "high": st.sampled_from([200, 3000, 500_000_000]),
    "whole": st.booleans(),
}
tried = settings(max_examples=60, deadline=None)


def buckets_of(plan: Plan) -> list[BucketPlan]:
    return [bucket for unit in plan.units for bucket in unit.buckets]


@tried
@given(**PLANS)
def test_every_parameter_has_exactly_one_place(model, world, low, high, whole) -> None:
    params, modules = model
    plan = make_plan(params, modules, world, min_numel=low, max_numel=high, param_aligned=whole)
    assert Counter(param.name for param in plan.params) == Counter(param.name for param in params)
    for param in params:
        unit, bucket, entry = plan.where(param.name)
        assert plan.units[unit.index] is unit and bucket in unit.buckets and entry in bucket.entries
        assert entry.param is param and (bucket.dtype, bucket.trainable) == (param.dtype, param.trainable)
    assert sum(unit.numel for unit in plan.units) == sum(param.numel for param in params)


@tried
@given(**PLANS)
def test_buckets_are_covered_once_and_cut_at_multiples_of_64(model, world, low, high, whole) -> None:
    """Element by element: each belongs to one entry or one gap, to one shard, and to one fragment or gap of it."""
    params, modules = model
    for bucket in buckets_of(make_plan(params, modules, world, min_numel=low, max_numel=high, param_aligned=whole)):
        owners = torch.zeros(bucket.size, dtype=torch.int64)
        for entry in bucket.entries:
            owners[entry.offset : entry.stop] += 1
            assert entry.offset % ALIGNMENT == 0
        for start, stop in bucket.gaps:
            assert start < stop
            owners[start:stop] += 1
        assert bool((owners == 1).all())
        assert bucket.cuts[0] == 0 and len(bucket.cuts) == world + 1
        assert all(cut % ALIGNMENT == 0 for cut in bucket.cuts) and list(bucket.cuts) == sorted(bucket.cuts)
        padding = bucket.size - bucket.numel
        assert padding <= ALIGNMENT * (len(bucket.entries) + world)
        pieces = [piece for rank in range(world) for piece in bucket.fragments(*bucket.shard(rank))]
        for entry in bucket.entries:
            own = sorted((p.start, p.stop, p.offset) for p in pieces if p.name == entry.param.name)
            assert sum(stop - start for start, stop, _ in own) == entry.param.numel
            assert all(before[1] == after[0] for before, after in pairwise(own))
            assert all(start + entry.offset == offset for start, _, offset in own)


@tried
@given(**PLANS)
def test_shards_are_of_one_size_or_on_whole_parameters(model, world, low, high, whole) -> None:
    params, modules = model
    for bucket in buckets_of(make_plan(params, modules, world, min_numel=low, max_numel=high, param_aligned=whole)):
        assert bucket.param_aligned == (whole and bucket.trainable)
        if bucket.param_aligned:
            for entry in bucket.entries:
                assert not any(entry.offset < cut < entry.stop for cut in bucket.cuts)
        else:
            assert len({stop - start for start, stop in pairwise(bucket.cuts)}) == 1


@tried
@given(**PLANS, start=st.integers(0, 5000), length=st.integers(0, 5000))
def test_fragments_of_any_range_are_those_of_a_naive_walk(model, world, low, high, whole, start, length) -> None:
    params, modules = model
    for bucket in buckets_of(make_plan(params, modules, world, min_numel=low, max_numel=high, param_aligned=whole)):
        stop = min(start + length, bucket.size)
        naive: list[tuple[str, int]] = []
        for entry in bucket.entries:
            naive += [(entry.param.name, i) for i in range(entry.param.numel) if start <= entry.offset + i < stop]
        found = [(p.name, i) for p in bucket.fragments(start, stop) for i in range(p.start, p.stop)]
        assert found == naive


@tried
@given(**PLANS)
def test_runs_partition_a_shard_by_param_group(model, world, low, high, whole) -> None:
    """Each shard of a trained bucket falls into runs; each holds elements of one group and
    number of steps, all of them once."""
    params, modules = model
    for bucket in buckets_of(make_plan(params, modules, world, min_numel=low, max_numel=high, param_aligned=whole)):
        if not bucket.trainable:
            continue
        for rank in range(world):
            start, stop = bucket.shard(rank)
            runs = list(bucket.runs(start, stop))
            for run in runs:
                inside = [bucket_param(bucket, piece.name) for piece in bucket.fragments(run.start, run.stop)]
                assert {param.group for param in inside} <= {run.group}
                assert len({param.state_steps for param in inside}) <= 1
                assert run.start % ALIGNMENT == 0 and start <= run.start < run.stop <= stop
            covered = sum(p.stop - p.start for run in runs for p in bucket.fragments(run.start, run.stop))
            assert covered == sum(p.stop - p.start for p in bucket.fragments(start, stop))
            assert all(before.stop <= after.start for before, after in pairwise(runs))
            if bucket.param_aligned:
                assert all(run.entry and (run.start, run.stop) == (run.entry.offset, run.entry.stop) for run in runs)
            else:  # no padding is stepped over
                assert sum(run.stop - run.start for run in runs) == stop - start


def bucket_param(bucket: BucketPlan, name: str) -> ParamSpec:
    return next(entry.param for entry in bucket.entries if entry.param.name == name)


@tried
@given(**PLANS)
def test_what_is_small_has_company_and_nothing_merged_is_large(model, world, low, high, whole) -> None:
    params, modules = model
    plan = make_plan(params, modules, world, min_numel=low, max_numel=high)
    for unit in plan.units:
        if len(unit.roots) > 1:
            assert unit.numel <= high
    for unit, following in pairwise(plan.units):
        same_kind = {root.startswith("blocks.") for root in (*unit.roots, *following.roots)}
        if unit.numel < low and len(same_kind) == 1 and "" not in (*unit.roots, *following.roots):
            first = following.roots[0]
            own = {name for m in modules if m.path == first or m.path.startswith(first + ".") for name in m.params}
            candidate = sum(p.numel for p in params if p.name in own and plan.where(p.name)[0] is following)
            kinds = {is_taken_apart(root, params, modules, high) for root in (*unit.roots, *following.roots)}
            assert unit.numel + candidate > high or len(kinds) > 1, (unit.roots, following.roots)


def is_taken_apart(root: str, params: list[ParamSpec], modules: list[ModuleSpec], high: int) -> bool:
    block = ".".join(root.split(".")[:2])
    below = {name for m in modules if m.path == block or m.path.startswith(block + ".") for name in m.params}
    return sum(p.numel for p in params if p.name in below) > high


@tried
@given(**PLANS)
def test_every_holder_of_a_parameter_uses_its_unit(model, world, low, high, whole) -> None:
    params, modules = model
    plan = make_plan(params, modules, world, min_numel=low, max_numel=high, param_aligned=whole)
    order = [module.path for module in modules]
    for unit in plan.units:
        holders = {m.path for m in modules for name in m.params if plan.where(name)[0] is unit}
        assert set(unit.users) == holders | set(unit.roots)
        assert list(unit.users) == sorted(unit.users, key=order.index)
    firsts = [order.index(unit.roots[0]) for unit in plan.units]
    assert firsts == sorted(firsts)


@tried
@given(model=models(), world=st.integers(1, 4), other=st.integers(1, 4))
@example(model=([], [ModuleSpec("", "Any", False, ())]), world=1, other=2)
def test_offsets_do_not_depend_on_the_world(model, world, other) -> None:
    """Where no parameter has a bucket of its own on a single process."""
    plans = [make_plan(*model, size) for size in (world, other)]
    where = [{p.name: (plan.where(p.name)[0].index, plan.where(p.name)[2].offset) for p in model[0]} for plan in plans]
    assert where[0] == where[1]
    assert (plans[0].fingerprint == plans[1].fingerprint) == (world == other or not model[0])
    assert make_plan(*model, world).fingerprint == plans[0].fingerprint


@settings(deadline=None)
@given(models(), st.integers(1, 400))
def test_on_a_single_process_large_gradients_that_are_kept_have_buckets_of_their_own(model, least) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shardline.plan.plan._OWN_BUCKET_NUMEL", least)
        kept = {torch.float32}
        plan, on_two = (make_plan(*model, world, kept_grads=kept) for world in (1, 2))
    for unit in plan.units:
        large = [param for bucket in unit.buckets for param in [e.param for e in bucket.entries]]
        large = [param for param in large if param.trainable and param.numel >= least and param.dtype in kept]
        alone = [bucket for bucket in unit.buckets if bucket.trainable and bucket.entries[0].param in large]
        assert [bucket.cuts for bucket in alone] == [(0, bucket.entries[0].param.numel) for bucket in alone]
        assert len(alone) == len(large) and all(len(bucket.entries) == 1 and not bucket.gaps for bucket in alone)
        assert [run.stop for bucket in alone for run in bucket.runs(0, bucket.size)] == [
            bucket.numel for bucket in alone
        ]
        rest = [(bucket.dtype, bucket.trainable) for bucket in unit.buckets if bucket not in alone]
        assert len(rest) == len(set(rest))
    for unit in on_two.units:
        kinds = [(bucket.dtype, bucket.trainable) for bucket in unit.buckets]
        assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize("change", ["shape", "stride", "dtype", "group", "state_steps", "name"])
def test_the_fingerprint_sees(change: str) -> None:
    values = {"name": "w", "aliases": ("w",), "shape": (4, 8), "stride": (8, 1), "dtype": torch.float32}
    values |= {"group": 0, "state_steps": 0}
    others = {"shape": (8, 4), "stride": (1, 4), "dtype": torch.float64, "group": 1, "state_steps": 1, "name": "v"}
    found = []
    for changed in (values, values | {change: others[change]}):
        spec = ParamSpec(**changed)
        found.append(make_plan([spec], [ModuleSpec("", "Any", False, (spec.name,))], 2).fingerprint)
    assert found[0] != found[1]


# --- bytes ------------------------------------------------------------------------------------------------------------

FORMULAS = {
    (torch.float32, torch.float32): [lambda n: 16, lambda n: 8 + 8 / n, lambda n: 4 + 12 / n, lambda n: 16 / n],
    (torch.bfloat16, torch.float32): [lambda n: 18, lambda n: 6 + 12 / n, lambda n: 2 + 16 / n, lambda n: 18 / n],
    (torch.bfloat16, torch.bfloat16): [lambda n: 16, lambda n: 4 + 12 / n, lambda n: 2 + 14 / n, lambda n: 16 / n],
}
"""DESIGN.md, section 4: bytes per parameter with Adam, by (weights, accumulation) and stage."""


@pytest.mark.parametrize("dtypes", FORMULAS, ids=lambda dtypes: "-".join(str(d).split(".")[1] for d in dtypes))
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_bytes_are_the_formula(dtypes, world) -> None:
    """Without padding: one matrix whose size 64 x 8 divides."""
    numel = 64 * 8 * 100
    spec = ParamSpec("w", ("w",), (numel,), (1,), dtypes[0], 0)
    plan = make_plan([spec], [ModuleSpec("", "Any", False, ("w",))], world)
    for stage, formula in zip(STAGES, FORMULAS[dtypes], strict=True):
        for rank in range(world):
            assert plan.state_bytes(stage, rank, accumulate=dtypes[1]) == formula(world) * numel


def test_frozen_parameters_cost_their_weights_only() -> None:
    spec = ParamSpec("w", ("w",), (6400,), (1,), torch.bfloat16, None)
    plan = make_plan([spec], [ModuleSpec("", "Any", False, ("w",))], 2)
    assert [plan.state_bytes(stage, 0) for stage in STAGES] == [12800, 12800, 12800, 6400]


def test_sgd_without_moments() -> None:
    spec = ParamSpec("w", ("w",), (1280,), (1,), torch.float32, 0)
    plan = make_plan([spec], [ModuleSpec("", "Any", False, ("w",))], 1)
    assert plan.state_bytes(STAGES[0], 0, moments=0) == 8 * 1280


# --- units of models as people write them -----------------------------------------------------------------------------


def plan_of(model: nn.Module, **kwargs) -> Plan:
    groups = {name: 0 for name, _ in model.named_parameters()}
    specs, _ = describe_params(model, Precision(), groups)
    return make_plan(specs, describe_modules(model), 2, **({"min_numel": 1} | kwargs))


def roots_of(plan: Plan) -> list[tuple[str, ...]]:
    return [unit.roots for unit in plan.units]


def params_of(plan: Plan, root: str) -> set[str]:
    unit = next(unit for unit in plan.units if root in unit.roots)
    return {entry.param.name for bucket in unit.buckets for entry in bucket.entries}


def test_gpt() -> None:
    """The tied head belongs to the embedding's unit, whose users are both; the root's own parameter is a unit."""
    plan = plan_of(TinyGpt())
    assert roots_of(plan) == [("",), ("embed",), ("blocks.0",), ("blocks.1",), ("norm",)]
    assert params_of(plan, "") == {"position"}
    tied = next(unit for unit in plan.units if unit.name == "embed")
    assert tied.users == ("embed", "head") and params_of(plan, "embed") == {"embed.weight"}
    assert len(params_of(plan, "blocks.0")) == 12


def test_untied_head_is_a_unit() -> None:
    assert roots_of(plan_of(TinyGpt(tied=False)))[-1] == ("head",)


class Basic(nn.Module):
    def __init__(self, width: int, grow: bool = False) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)) if grow else None


class ResNet(nn.Module):
    """As torchvision lays one out: stages are Sequentials of blocks that may hold Sequentials themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 7), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Basic(8), Basic(8))
        self.layer2 = nn.Sequential(Basic(8, grow=True), Basic(8))
        self.head = nn.Linear(8, 10)


def test_resnet() -> None:
    plan = plan_of(ResNet())
    assert roots_of(plan) == [
        ("conv1",), ("norm1",), ("layer1.0",), ("layer1.1",), ("layer2.0",), ("layer2.1",), ("head",)
    ]  # fmt: skip
    assert {"layer2.0.downsample.0.weight", "layer2.0.downsample.1.bias"} <= params_of(plan, "layer2.0")


def test_sequential_of_sequentials() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2)))
    assert roots_of(plan_of(model)) == [("0.0",), ("0.2",), ("1.0",), ("1.2",)]
    numel = sum(p.numel() for p in model[0].parameters())
    assert roots_of(plan_of(model, min_numel=numel)) == [("0.0", "0.2"), ("1.0", "1.2")]


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 17, 8))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 8, 4)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 10)


def test_vit() -> None:
    """Parameters of the root are a unit of their own: no catch-all that everything else joins."""
    plan = plan_of(ViT())
    assert roots_of(plan) == [
        ("",), ("patch_embed.proj",), ("blocks.0",), ("blocks.1",), ("blocks.2",), ("norm",), ("head",)
    ]  # fmt: skip
    assert params_of(plan, "") == {"cls_token", "pos_embed"}
    assert params_of(plan_of(ViT(), min_numel=10**9), "") == {"cls_token", "pos_embed"}


class Moe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))


class MoeLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.moe = nn.Linear(8, 8), Moe()


class MoeModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(MoeLayer() for _ in range(2))


def test_experts_belong_to_their_layer() -> None:
    """So that which expert a token takes never decides which collectives a rank issues."""
    assert roots_of(plan_of(MoeModel())) == [("embed",), ("layers.0",), ("layers.1",)]


def test_a_layer_that_is_too_large_is_taken_apart() -> None:
    layer = sum(p.numel() for p in MoeLayer().parameters())
    plan = plan_of(MoeModel(), max_numel=layer - 1)
    assert roots_of(plan)[1:6] == [
        ("layers.0.attention",), ("layers.0.moe.router",), *[(f"layers.0.moe.experts.{i}",) for i in range(3)]
    ]  # fmt: skip


def test_a_chosen_module_inside_a_block_is_a_unit() -> None:
    """`leaf_module` names what shall be a unit "whatever its size"; experts always lie inside blocks."""
    assert ("layers.0.moe",) in roots_of(plan_of(MoeModel(), chosen=["layers.0.moe", "layers.1.moe"]))


def test_a_chosen_module_around_blocks_is_a_unit() -> None:
    assert roots_of(plan_of(MoeModel(), chosen=["layers"], min_numel=10**6)) == [("embed",), ("layers",)]


def test_a_chosen_module_keeps_to_itself() -> None:
    everything = {name for name, _ in Mlp().named_parameters()}
    plan = plan_of(Mlp(), chosen=["blocks.1"], min_numel=10**6)
    assert roots_of(plan) == [("blocks.0",), ("blocks.1",), ("blocks.2", "blocks.3"), ("head",)]
    assert set.union(*(params_of(plan, unit.roots[0]) for unit in plan.units)) == everything


def test_nested_blocks_belong_to_the_outer_one() -> None:
    plan = plan_of(Nested())
    assert roots_of(plan) == [("stages.0",), ("stages.1",), ("head",)]
    assert "stages.0.gain" in params_of(plan, "stages.0") and "stages.0.blocks.1.up.weight" in params_of(
        plan, "stages.0"
    )


def test_small_blocks_share_a_unit_up_to_the_cap() -> None:
    block = sum(p.numel() for p in Mlp().blocks[0].parameters())
    pairs = [("blocks.0", "blocks.1"), ("blocks.2", "blocks.3"), ("head",)]
    assert roots_of(plan_of(Mlp(), min_numel=2 * block)) == pairs
    assert roots_of(plan_of(Mlp(), min_numel=10**9, max_numel=2 * block)) == pairs


def test_ties_between_blocks_belong_to_the_first() -> None:
    model = Mlp()
    model.blocks[3].up.weight = model.blocks[0].up.weight
    plan = plan_of(model)
    assert "blocks.0.up.weight" in params_of(plan, "blocks.0")
    assert next(u for u in plan.units if "blocks.0" in u.roots).users == ("blocks.0", "blocks.0.up", "blocks.0.down",
                                                                          "blocks.3.up")  # fmt: skip


def test_param_groups_lie_together() -> None:
    """Weights and biases alternate in a model; their groups do not in a bucket, so that each is one run."""
    model = Mlp(depth=3)
    groups = {name: int(name.endswith("bias")) for name, _ in model.named_parameters()}
    specs, _ = describe_params(model, Precision(), groups)
    plan = make_plan(specs, describe_modules(model), 1, min_numel=1)
    for bucket in buckets_of(plan):
        assert [run.group for run in bucket.runs(0, bucket.size)] == [0, 1]
