"""One unit at run time: its buffers at every stage and dtype, gathering, releasing, reducing, edits."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardline.comm import Comm
from shardline.errors import ModelError, SealedError, UsageError
from shardline.plan import make_plan
from shardline.plan.describe import describe_modules, describe_params
from shardline.plan.placement import STAGES
from shardline.sharding.buffer import BufferPool, view
from shardline.sharding.parameter import autograd_grad, is_sealed, set_grad
from shardline.sharding.precision import Precision
from shardline.sharding.unit import Residence, Unit

FP32, BF16 = torch.float32, torch.bfloat16


class Pair(nn.Module):
    """A frozen vector, a matrix whose size 64 does not divide, a scalar and a matrix stored by columns."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.frozen = nn.Parameter(torch.randn(10, generator=g), requires_grad=False)
        self.matrix = nn.Parameter(torch.randn(9, 11, generator=g))
        self.scalar = nn.Parameter(torch.tensor(0.25))
        self.columns = nn.Parameter(torch.randn(7, 5, generator=g).t())


def make(stage=3, precision=None, comm=None, model=None):
    """The unit of a Pair, settled; and the model, and its values before."""
    comm = comm or Comm(dist.group.WORLD if dist.is_initialized() else None, torch.device("cpu"))
    precision, model = precision or Precision(), model or Pair()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = {name: 0 for name, _ in model.named_parameters()}
    specs, params = describe_params(model, precision, groups)
    plan = make_plan(specs, describe_modules(model), comm.data.size, kept_grads={FP32})
    (unit_plan,) = plan.units
    unit = Unit(
        unit_plan, params, STAGES[stage], comm, BufferPool(comm.device), precision, on_sealed_access=lambda unit: False
    )
    unit.allocate()
    for bucket in unit.buckets:
        for entry in bucket.plan.entries:
            bucket.weights.store(entry, before[entry.param.name])
    unit.finish_load()
    return unit, model, before


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(got, expected, dtype=FP32):
    return all(torch.equal(got[name].float(), value.to(dtype).float()) for name, value in expected.items())


# --- a single process: everything is an alias -------------------------------------------------------------------------


@pytest.mark.parametrize("stage", range(4))
def test_alone_the_parameters_are_views_of_the_masters(stage) -> None:
    unit, model, before = make(stage)
    (bucket,) = unit.trainable
    assert same(values(model), before) and unit.residence is Residence.GATHERED and not unit.sharded
    assert (
        bucket.weights.master is bucket.weights.resting is bucket.weights.full
        or bucket.weights.master.data_ptr() == bucket.weights.resting.data_ptr()
    )
    model.matrix.data.fill_(3.0)
    assert bool((bucket.weights.master[bucket.plan.entries[0].offset :][:99] == 3.0).all())
    assert model.columns.stride() == (1, 5)
    assert not unit.comm.log.counts


@pytest.mark.parametrize("compute", [BF16, torch.float16])
def test_masters_keep_what_low_precision_loses(compute) -> None:
    unit, model, before = make(1, Precision(compute=compute))
    (bucket,) = unit.trainable
    assert model.matrix.dtype is compute and bucket.weights.master.dtype is FP32
    entry = bucket.plan.entries[0]
    assert torch.equal(bucket.weights.master[entry.offset : entry.stop], before["matrix"].flatten())
    bucket.weights.master.mul_(2.0)
    unit.refresh()
    assert torch.equal(model.matrix, (before["matrix"] * 2).to(compute))


def test_frozen_parameters_have_no_masters_and_no_gradients() -> None:
    unit, model, _ = make(1, Precision(compute=BF16))
    frozen = next(bucket for bucket in unit.buckets if not bucket.plan.trainable)
    assert frozen.weights.master is None and list(frozen.runs()) == [] and frozen not in unit.trainable
    set_grad(model.matrix, torch.ones(9, 11, dtype=BF16))
    unit.accumulate(1.0)
    assert frozen.grads.reduced is None and frozen.grads.partial is None


def test_gradients_are_collected_added_and_dropped() -> None:
    unit, model, _ = make(2)
    (bucket,) = unit.trainable
    for turn in (1.0, 2.0):
        set_grad(model.matrix, torch.full((9, 11), turn))
        set_grad(model.columns, torch.arange(35.0).reshape(5, 7))  # in another order than the weight
        unit.reduce_scatter(0.5)
        assert autograd_grad(model.matrix) is None
    places = {entry.param.name: bucket.grads.reduced[entry.offset : entry.stop] for entry in bucket.plan.entries}
    assert bool((places["matrix"] == 1.5).all()) and bool((places["scalar"] == 0).all())
    assert torch.equal(places["columns"].as_strided((5, 7), (1, 5)), torch.arange(35.0).reshape(5, 7))
    assert float(bucket.grads.reduced.sum()) == float(places["matrix"].sum() + places["columns"].sum()), (
        "padding stays zero"
    )
    unit.drop_grads()
    set_grad(model.scalar, torch.tensor(4.0))
    unit.reduce_scatter(1.0)
    assert float(bucket.grads.reduced.sum()) == 4.0, "nothing of the window before"


def test_sparse_and_low_precision_gradients() -> None:
    model = nn.Embedding(6, 4, sparse=True)
    unit, model, _ = make(2, Precision(compute=BF16), model=model)
    model(torch.tensor([1, 1, 4])).float().sum().backward()
    unit.accumulate(1.0)
    (bucket,) = unit.trainable
    assert bucket.grads.reduced.dtype is FP32 and bucket.grads.reduced[:24].view(6, 4).sum(1).tolist() == [
        0,
        8,
        0,
        0,
        4,
        0,
    ]


def test_runs_are_views_of_master_and_gradient() -> None:
    unit, _, _ = make(1, Precision(compute=BF16))
    (bucket,) = unit.trainable
    (run,) = bucket.runs()
    assert bucket.grads.of_run(run.run) is None
    unit.accumulate(1.0)
    run.param.fill_(1.0)
    bucket.grads.of_run(run.run).fill_(2.0)
    assert bool((bucket.weights.master == 1).all()) and bool((bucket.grads.reduced == 2).all())
    assert [piece.name for piece in run.fragments] == ["matrix", "scalar", "columns"]


def test_edits_at_rest_are_adopted() -> None:
    unit, model, _ = make(1, Precision(compute=BF16))
    (bucket,) = unit.trainable
    kept = bucket.weights.master.clone()
    with torch.no_grad():
        model.scalar.fill_(8.0)
    assert unit.edited() == ["scalar"]
    unit.adopt_edits(restorable=True)
    entry = bucket.plan.entries[1]
    assert float(bucket.weights.master[entry.offset]) == 8.0 and unit.edited() == []
    rest = torch.cat([bucket.weights.master[: entry.offset], bucket.weights.master[entry.stop :]])
    assert torch.equal(rest, torch.cat([kept[: entry.offset], kept[entry.stop :]])), "the others keep their fp32 bits"


@pytest.mark.parametrize(
    "replace",
    [
        lambda p: p.data.double(),
        lambda p: p.data.t(),
        lambda p: p.data[:-1],
        lambda p: p.data.to("meta"),
    ],
)
def test_a_replaced_tensor_is_named_before_anything_changes(replace) -> None:
    unit, model, before = make(1)
    with pytest.raises(ModelError, match=r"'matrix' was replaced"):
        model.matrix.data = replace(model.matrix)
    unit.adopt_edits(restorable=True)
    assert same(values(model), before)


def test_a_swapped_tensor_is_named() -> None:
    """What torch does inside, past the class of a parameter, is seen at the next step."""
    unit, model, _ = make(1)
    torch.utils.swap_tensors(model.matrix, nn.Parameter(torch.ones(9, 11)))
    with pytest.raises(ModelError, match=r"'matrix' was replaced"):
        unit.adopt_edits(restorable=True)


@pytest.mark.parametrize("stage", [0, 1])
def test_data_edits_are_adopted_as_long_as_somebody_holds_it(stage) -> None:
    unit, model, _ = make(stage, Precision(compute=BF16))
    (bucket,) = unit.trainable
    low, high = bucket.plan.entries[2].offset, bucket.plan.entries[2].stop
    kept, version = bucket.weights.master.clone(), model.columns._version
    held = model.columns.data[1:]  # a view of what .data gave: it is enough to write
    unit.adopt_edits(restorable=True)
    assert torch.equal(bucket.weights.master, kept), "nothing was written"
    for value in (2.0, 3.0):
        held.fill_(value)
        unit.adopt_edits(restorable=True)
        shown = bucket.weights.master[low:high].as_strided((5, 7), (1, 5))
        assert bool((shown[1:] == value).all()) and torch.equal(shown[0], kept[low:high].as_strided((5, 7), (1, 5))[0])
    assert torch.equal(bucket.weights.master[:low], kept[:low]) and model.columns._version == version
    del held
    unit.adopt_edits(restorable=True)
    assert not bucket.edits.changed(), "it cannot be written to any more: it is not looked at again"


@pytest.mark.parametrize("change", [lambda p: p.t_(), lambda p: p.unsqueeze_(0), lambda p: p.set_(torch.ones(9, 11))])
def test_a_shape_changed_in_place_is_named(change) -> None:
    unit, model, _ = make(1)
    with torch.no_grad():
        change(model.matrix)
    with pytest.raises(ModelError, match=r"'matrix' was replaced"):
        unit.adopt_edits(restorable=True)


def test_assigned_data_is_copied_in() -> None:
    unit, model, _ = make(1, Precision(compute=BF16))
    (bucket,) = unit.trainable
    memory = model.columns.data_ptr()
    model.columns.data = torch.arange(35.0, dtype=BF16).reshape(7, 5).t()
    model.matrix.data = model.matrix.data
    unit.adopt_edits(restorable=True)
    assert model.columns.data_ptr() == memory and model.columns.stride() == (1, 5)
    entry = bucket.plan.entries[2]
    assert bucket.weights.master[entry.offset : entry.stop].tolist() == list(range(35))


def test_masters_come_back_with_the_weights() -> None:
    """Swapped out, taken over (a save does that), and swapped in again, before training goes on."""
    unit, model, _ = make(1, Precision(compute=BF16))
    (bucket,) = unit.trainable
    masters, stored = bucket.weights.master.clone(), values(model)

    def put(weights):
        for name, p in model.named_parameters():
            p.data.copy_(weights[name])
        unit.adopt_edits(restorable=True)

    zeros = {name: torch.zeros_like(value) for name, value in stored.items()}
    put(zeros)
    assert not bucket.weights.master.any()
    put({**stored, "scalar": torch.tensor(4.0)})
    entry = bucket.plan.entries[1]
    expected = masters.clone()
    expected[entry.offset] = 4.0
    assert torch.equal(bucket.weights.master, expected)
    put(zeros)
    unit.forget_before_edit()  # training goes on from zeros
    put(stored)
    assert torch.equal(bucket.weights.master, masters.to(BF16).float()), "nothing but the rounded weights is left"


def test_letting_go_gives_ordinary_parameters() -> None:
    unit, model, before = make(2)
    memory = unit.buckets[0].weights.resting
    unit.detach_params()
    assert same(values(model), before) and type(model.matrix) is nn.Parameter
    memory.fill_(9.0)
    assert same(values(model), before)


def test_a_unit_in_use_is_not_updated() -> None:
    unit, _, _ = make(2)
    unit.hold()
    with pytest.raises(UsageError, match="in use"):
        unit.refresh()


def test_alone_a_large_gradient_is_taken_as_it_is(monkeypatch) -> None:
    """No copy, whatever its size and strides; but not of memory that another gradient lies in too."""
    monkeypatch.setattr("shardline.plan.plan._OWN_BUCKET_NUMEL", 9)
    unit, model, _ = make()
    made = {name: torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        set_grad(p, made.get(name))
    places = {name: grad.data_ptr() for name, grad in made.items() if name != "scalar"}
    expected = {name: grad.clone() for name, grad in made.items()}
    del made, p
    unit.accumulate(0.5)
    for bucket in unit.trainable:
        for entry in bucket.plan.entries:
            name = entry.param.name
            assert torch.equal(view(bucket.grads.reduced, entry), expected[name] * 0.5)
            assert name == "scalar" or bucket.grads.reduced.data_ptr() == places[name]
    unit.drop_grads()

    both = torch.randn(9, 11)
    for _ in range(2):  # the second is added to the first
        set_grad(model.matrix, both[:])
        set_grad(model.columns, both.view(-1)[:35].as_strided((5, 7), (1, 5)))
        unit.accumulate(0.25)
    (matrix, columns) = (bucket for bucket in unit.trainable if bucket.plan.entries[0].param.name != "scalar")
    assert torch.equal(matrix.grads.reduced, both.view(-1) * 0.5)
    assert torch.equal(columns.grads.reduced, both.view(-1)[:35] * 0.5)


# --- several ranks ----------------------------------------------------------------------------------------------------


def life(stage, compute):
    """Rest, gather, release, a reduction of gradients that differ by rank, an update, and rest again."""
    unit, model, before = make(stage, Precision(compute=compute))
    rank, world = unit.comm.data.rank, unit.comm.data.size
    (bucket,) = unit.trainable
    seen = {"sharded": unit.sharded, "resting": bucket.weights.resting.numel(), "sealed": is_sealed(model.matrix)}
    seen["master"] = bucket.weights.master.numel()
    unit.wait_for_unshard()
    seen["gathered"] = same(values(model), before, compute)
    seen["residence"] = [unit.residence.value]
    unit.reshard()
    seen["residence"].append(unit.residence.value)
    if not unit.sharded:
        unit.note_versions()
    else:
        unit.wait_for_unshard()
    set_grad(model.matrix, torch.full((9, 11), rank + 1.0, dtype=compute))
    if rank == 0:
        set_grad(model.columns, torch.ones(5, 7, dtype=compute))
    unit.reduce_scatter(0.5)
    unit.wait_for_reduce()
    for work in unit.gather_grads():
        work.wait()
    low, high = bucket.shard.states
    grad = bucket.grads.reduced if high - low == bucket.plan.size else bucket.shard.own(bucket.grads.reduced)
    expected = torch.zeros(bucket.plan.size)
    for entry in bucket.plan.entries:
        total = {"matrix": world * (world + 1) / 4, "columns": 0.5, "scalar": 0.0}[entry.param.name]
        expected[entry.offset : entry.stop] = total
    seen["reduced"] = torch.equal(grad, expected[low:high])
    generation = bucket.weights.generation
    bucket.weights.master.add_(grad)
    for work in unit.refresh():
        work.wait()
    seen["generation"] = bucket.weights.generation - generation
    unit.wait_for_unshard()
    totals = {"matrix": world * (world + 1) / 4, "columns": 0.5, "scalar": 0.0, "frozen": 0.0}
    seen["updated"] = same(values(model), {name: value + totals[name] for name, value in before.items()}, compute)
    seen["size"] = bucket.plan.size
    unit.comm.close()
    return seen


@pytest.mark.parametrize("compute", [FP32, BF16])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("world", [2, 3])
def test_the_life_of_a_unit(ranks, world, stage, compute) -> None:
    row = STAGES[stage]
    for seen in ranks(life, world, stage, compute):
        part = seen["size"] // world
        assert seen["sharded"] == seen["sealed"] == (stage == 3)
        assert seen["resting"] == (part if row.weights.value == "S" else seen["size"])
        assert seen["master"] == (part if row.states.value == "S" else seen["size"])
        assert seen["gathered"] and seen["reduced"] and seen["updated"]
        assert seen["residence"] == ["gathered", "sharded" if stage == 3 else "gathered"]
        assert seen["generation"] >= 1


def accumulate(reduce_dtype):
    """A micro-step kept here, one reduced with it, one reduced on top; rank 1 has no gradient the first time."""
    unit, model, _ = make(2, Precision(compute=BF16, reduce=reduce_dtype))
    rank = unit.comm.data.rank
    if rank == 0:
        set_grad(model.scalar, torch.tensor(1.0, dtype=BF16))
    unit.accumulate(1.0)
    waits = [unit.has_partial()]
    set_grad(model.scalar, torch.tensor(2.0**-9, dtype=BF16))  # lost if it were added to 1 in bf16
    unit.reduce_scatter(1.0)
    unit.wait_for_reduce()
    set_grad(model.scalar, torch.tensor(4.0, dtype=BF16))
    unit.reduce_scatter(1.0)
    unit.wait_for_reduce()
    waits.append(unit.has_partial())
    (bucket,) = unit.trainable
    entry = bucket.plan.entries[1]
    mine = bucket.shard.start <= entry.offset < bucket.shard.stop
    found = float(bucket.grads.reduced[entry.offset - bucket.shard.start]) if mine else None
    unit.comm.close()
    return found, waits


@pytest.mark.parametrize("reduce_dtype", [None, FP32])
def test_accumulation_keeps_fp32_and_the_wire_what_it_is_told(ranks, reduce_dtype) -> None:
    results = ranks(accumulate, 2, reduce_dtype)
    assert all(waits == [True, False] for _, waits in results)
    (found,) = [value for value, _ in results if value is not None]
    exact = 1 + 2 * 2.0**-9 + 8
    rounded = float(torch.tensor(1 + 2.0**-9).to(BF16)) + 2.0**-9 + 8  # rank 0's sum travels in bf16
    assert found == (exact if reduce_dtype is FP32 else rounded)


def edits():
    """What is done to gathered weights: kept on release, rank 0's on write-back; sealed ones refuse."""
    unit, model, before = make(3, Precision(compute=BF16))
    rank = unit.comm.data.rank
    said = []
    try:
        model.matrix.add_(1.0)
    except SealedError as error:
        said.append(str(error))
    unit.wait_for_unshard()
    unit.hold()
    with torch.no_grad():
        model.scalar.fill_(2.0 + rank)
    unit.write_back()
    unit.unhold()
    unit.reshard()
    unit.wait_for_unshard()
    scalar = float(model.scalar)
    generations = [bucket.weights.generation for bucket in unit.buckets]
    versions = model.frozen._version
    with torch.no_grad():
        model.frozen.fill_(5.0)
    unit.reshard()
    # What was saved of this parameter is stale by its version, and what was saved of others is not.
    raised = model.frozen._version - versions, [bucket.weights.generation for bucket in unit.buckets] == generations
    unit.wait_for_unshard()
    frozen = model.frozen.detach().clone()
    (bucket,) = unit.trainable
    entry = bucket.plan.entries[1]
    masters = (
        [float(bucket.weights.master[entry.offset - bucket.shard.start])]
        if bucket.shard.start <= entry.offset < bucket.shard.stop
        else []
    )
    rest = torch.equal(model.matrix.float(), before["matrix"].to(BF16).float())
    unit.comm.close()
    return said, scalar, raised, frozen, masters, rest


def test_edits_of_gathered_weights(ranks) -> None:
    results = ranks(edits, 2)
    assert sorted(m for r in results for m in r[4]) == [2.0]
    for said, scalar, raised, frozen, _, rest in results:
        assert len(said) == 1 and "'matrix'" in said[0]
        assert scalar == 2.0 and raised == (1, True) and bool((frozen == 5).all()) and rest


def edits_by_data():
    """The same by ``.data``, which no version tells: on this rank's shard, and the names of what was changed."""
    unit, model, before = make(3, Precision(compute=BF16))
    unit.wait_for_unshard()
    named = [unit.edited()]
    model.frozen.data.fill_(5.0)
    model.scalar.data  # noqa: B018 - read, not written
    named.append(unit.edited())
    unit.reshard()
    unit.wait_for_unshard()
    named.append(unit.edited())
    right = bool((model.frozen == 5).all()) and same({"matrix": model.matrix}, {"matrix": before["matrix"]}, BF16)
    unit.comm.close()
    return named, right


def test_edits_of_gathered_weights_by_data(ranks) -> None:
    results = ranks(edits_by_data, 2)
    for named, right in results:
        assert right and named[0] == named[2] == []
    assert ["frozen"] in [named[1] for named, _ in results], "on the rank whose shard it is in"


def early_release():
    """A gather in flight is dropped; the next one is right."""
    unit, model, before = make(3)
    unit.unshard()
    states = [unit.residence.value]
    unit.reshard()
    states.append(unit.residence.value)
    unit.hold()
    unit.wait_for_unshard()
    unit.reshard()  # in use: stays
    states.append(unit.residence.value)
    right = same(values(model), before)
    counts = unit.comm.log.counts["gather", 0]
    unit.comm.close()
    return states, right, counts


def test_residence_moves_through_its_states(ranks) -> None:
    for states, right, counts in ranks(early_release, 2):
        assert states == ["gathering", "sharded", "gathered"] and right
        assert counts == 4  # two buckets, twice


def make_ordinary():
    unit, model, before = make(3)
    unit.detach_params()
    unit.comm.close()
    return same(values(model), before), [type(p).__name__ for p in model.parameters()], model.columns.stride()


def test_letting_go_of_sharded_parameters(ranks) -> None:
    for right, kinds, stride in ranks(make_ordinary, 2):
        assert right and kinds == ["Parameter"] * 4 and stride == (1, 5)
