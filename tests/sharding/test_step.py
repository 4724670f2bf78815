"""The update: what ranks say together against arithmetic by hand, and steps against torch on gradients by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from shardline.comm import Comm
from shardline.optim import prepare
from shardline.plan import make_plan
from shardline.plan.describe import describe_modules, describe_params
from shardline.plan.placement import STAGES
from shardline.sharding.buffer import BufferPool
from shardline.sharding.precision import Precision
from shardline.sharding.step import StepReport, Update, Verdict
from shardline.sharding.unit import Unit

CPU = torch.device("cpu")


def rows(*values: tuple[float, ...]) -> torch.Tensor:
    """Per rank: squares, weight, left_order, late, samples, backwards (1), exit_requested, alike, on_device (0)."""
    order = (0, 1, 3, 4, 5, 6, 7, 2, 8, 9)  # of the columns
    full = [[*row, *[1.0, 0.0, 0.0, 0.0][len(row) - 6 :]] for row in values]
    told = [0.0, 0.0, 0.0, 0.0]  # loss, counted, tokens, waited
    return torch.tensor([[*(row[place] for place in order), *told] for row in full], dtype=torch.float64)


def verdict(*values, accumulation=1.0, loss_scale=1.0, clip=0.0, check=False) -> Verdict:
    return Verdict.of(rows(*values), accumulation=accumulation, loss_scale=loss_scale, clip=clip, check=check)


def test_a_report_is_what_it_says() -> None:
    report = StepReport(
        squares=torch.tensor(2.5, dtype=torch.float64),
        weight=3.0,
        left_order=True,
        late=1,
        samples=40,
        backwards=2,
        exit_requested=True,
        transitions=2**32 - 1,
        fingerprint=2**32 - 2,
        on_device=None,
    )
    stacked = report.stack(CPU)
    assert stacked.dtype is torch.float64
    assert stacked.tolist() == [2.5, 3.0, 1, 1, 40, 2, 1, 2**32 - 1, 2**32 - 2, 0, 0, 0, 0, 0]
    known = replace(report, on_device=torch.tensor(9.0, dtype=torch.float64), loss=torch.tensor([6.0]), counted=3.0)
    known = replace(known, tokens=7, waited=0.25, groups=torch.tensor([2.0, 0.5], dtype=torch.float64))
    assert known.stack(CPU).tolist() == [*stacked.tolist()[:9], 9, 6, 3, 7, 0.25, 2, 0.5]


def test_what_is_told_of_a_step() -> None:
    """The loss is the mean over all that it counts for, and each group's norm the average's, as the whole norm is."""
    told = {"loss": [6.0, 1.0], "counted": [3.0, 1.0], "tokens": [7.0, 8.0], "waited": [0.25, 0.0]}
    row = rows((9, 2, 5, 0, 0, 8), (16, 4, 5, 0, 0, 16))
    row[:, 10:] = torch.tensor(list(told.values()), dtype=torch.float64).T
    groups = torch.tensor([[5.0, 4.0], [15.0, 1.0]], dtype=torch.float64)
    found = Verdict.of(torch.cat([row, groups], dim=1), accumulation=2, loss_scale=8, clip=0.0, check=True)
    host = found.read()
    assert (host.loss, host.tokens, host.waited) == (7 / 4, 15, (0.25, 0.0))
    assert host.group_norms == pytest.approx([math.sqrt(20) / 24, math.sqrt(5) / 24])
    assert math.hypot(*host.group_norms) == pytest.approx(host.norm) and not host.skipped
    assert verdict((9, 2, 5, 0, 0, 8)).read().loss is None


def test_norm_and_average() -> None:
    """Sums of gradients whose squares are 9 and 16, from 2 + 4 micro-steps of 1/2 each, under a scale of 8."""
    found = verdict((9, 2, 5, 0, 0, 8), (16, 4, 5, 0, 0, 16), accumulation=2, loss_scale=8)
    assert float(found.divisor) == 6 / 2 * 8
    assert float(found.norm) == pytest.approx(5 / 24) and float(found.scale) == pytest.approx(24)
    host = found.read()
    assert (host.skipped, host.diverged, host.left_order, host.late, host.samples) == (False, False, False, False, 24)
    assert host.norm == pytest.approx(5 / 24)


def test_clipping_divides_by_what_is_too_much() -> None:
    found = verdict((16, 1, 0, 0, 0, 1), (9, 1, 0, 0, 0, 1), clip=0.5)
    assert float(found.norm) == 2.5, "before clipping"
    assert float(found.scale) == pytest.approx(2 * 2.5 / 0.5, rel=1e-5)
    assert float(verdict((16, 1, 0, 0, 0, 1), (9, 1, 0, 0, 0, 1), clip=5.0).scale) == 2.0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_found_inf_where_it_is_looked_for(bad) -> None:
    assert float(verdict((bad, 1, 0, 0, 0, 1), (1, 1, 0, 0, 0, 1), check=True).found_inf) == 1.0
    assert float(verdict((1, 1, 0, 0, 0, 1), check=True).found_inf) == 0.0
    assert not verdict((bad, 1, 0, 0, 0, 1)).read().skipped


def test_ranks_that_did_different_things_do_not_step() -> None:
    host = verdict((1, 1, 5, 6, 0, 1), (1, 1, 4, 6, 0, 1)).read()
    assert host.diverged and host.skipped
    host = verdict((1, 1, 5, 0, 0, 1), (1, 1, 5, 1, 0, 1)).read()
    assert not host.diverged and not host.skipped and host.left_order
    host = verdict((1, 1, 5, 6, 0, 1), (1, 1, 5, 6, 2, 1)).read()
    assert host.late and host.skipped and not host.diverged


@pytest.mark.parametrize("column", [8, 9], ids=["host", "device"])
def test_ranks_that_are_not_alike_do_not_step(column) -> None:
    """Masked where the host does not know yet; and it learns why."""
    side = [1, 1, 5, 6, 0, 1, 1, 0, 3, 4]
    other = list(side)
    other[column] += 1
    found = verdict(tuple(side), tuple(other))
    assert float(found.found_inf) == 1.0
    host = found.read()
    assert not host.consistent and host.skipped and not host.diverged
    assert verdict(tuple(side), tuple(side)).read().consistent


def test_one_rank_that_leaves_takes_all_along() -> None:
    assert verdict((1, 1, 0, 0, 0, 1, 1, 0), (1, 1, 0, 0, 0, 1, 1, 1)).read().exit_requested
    assert not verdict((1, 1, 0, 0, 0, 1, 1, 0), (1, 1, 0, 0, 0, 1, 1, 0)).read().exit_requested


def test_a_step_without_any_backward_is_no_step() -> None:
    found = verdict((0, 1, 0, 0, 0, 1, 0, 0), (0, 1, 0, 0, 0, 1, 0, 0))
    assert found.read().skipped and not found.read().backwards
    assert not verdict((1, 1, 0, 0, 0, 1, 1, 0), (0, 1, 0, 0, 0, 1, 0, 0)).read().skipped


# --- applying ---------------------------------------------------------------------------------------------------------


OPTIMIZERS = {
    "fused": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "foreach": lambda params: torch.optim.RMSprop(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
}


def make(make_optimizer, compute=torch.float32, model_dtype=torch.float32, mixed=False):
    """An update over a linear layer in one process, and that layer in plain PyTorch; ``mixed``: its bias is fp32."""
    torch.manual_seed(0)
    model, plain = nn.Linear(8, 4).to(model_dtype), nn.Linear(8, 4).to(model_dtype)
    if mixed:
        for each in (model, plain):
            each.bias = nn.Parameter(each.bias.detach().float())
    plain.load_state_dict(model.state_dict())
    comm, precision = Comm(None, CPU), Precision(compute=compute)
    specs, params = describe_params(model, precision, {"weight": 0, "bias": 0})
    plan = make_plan(specs, describe_modules(model), 1)
    unit = Unit(plan.units[0], params, STAGES[1], comm, BufferPool(CPU), precision, lambda unit: False)
    unit.allocate()
    for bucket in unit.buckets:
        for entry in bucket.plan.entries:
            bucket.weights.store(entry, plain.get_parameter(entry.param.name).detach())
    unit.finish_load()
    runs = [run for bucket in unit.buckets for run in bucket.runs()]
    optimizer = make_optimizer([run.param for run in runs])
    prepare(optimizer)
    return Update([unit], comm, optimizer, runs), unit, model, plain


def give_gradients(model, unit, times: float = 1.0) -> dict[str, torch.Tensor]:
    grads = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for name, p in
             model.named_parameters()}  # fmt: skip
    for name, p in model.named_parameters():
        p.grad = (grads[name] * times).to(p.dtype)
    unit.reduce_scatter(1.0)
    return grads


@pytest.mark.parametrize("known", [True, False], ids=["host knows", "device only"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_the_step_of_averaged_and_clipped_gradients(name, known) -> None:
    update, unit, model, plain = make(OPTIMIZERS[name])
    reference = OPTIMIZERS[name](plain.parameters())
    for _ in range(2):
        grads = give_gradients(model, unit, times=4.0)
        judged = verdict((float(update.squares()), 4, 0, 0, 0, 4), clip=0.3)
        if not known and update.needs_host(False):
            return  # no test calls this
        update.apply(judged, judged.read() if known else None, 0.3, None)
        unit.drop_grads()
        for key, p in plain.named_parameters():
            p.grad = grads[key].clone()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        reference.step()
    for key, p in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(key), p, rtol=1e-5, atol=1e-6)
    assert all(run.param.grad is None for run in update.runs) and not update.applying


def test_what_a_step_writes_is_checked_for_readers_before(monkeypatch) -> None:
    """In fp32 masters are the weights at rest, which peers may read."""
    update, unit, model, _ = make(OPTIMIZERS["fused"])
    give_gradients(model, unit)
    before, found = model.weight.detach().clone(), []

    def check_unread(buffers) -> None:
        found.extend(buffers)
        raise AssertionError("a peer reads")

    monkeypatch.setattr(update.comm, "check_unread", check_unread)
    judged = verdict((float(update.squares()), 1, 0, 0, 0, 1), clip=0.0)
    with pytest.raises(AssertionError, match="a peer reads"):
        update.apply(judged, judged.read(), 0.0)
    assert torch.equal(model.weight, before)
    assert {each.data_ptr() for each in found} == {run.param.data_ptr() for run in update.runs}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("known", [True, False], ids=["host knows", "device only"])
@pytest.mark.parametrize("name", ["fused", "foreach", "momentum", "mixed"])
def test_float64_is_clipped_in_float64(name, known, dtype) -> None:
    """As plain torch does, to the last bits: a factor in fp32 is off by 2e-9."""
    make_optimizer = OPTIMIZERS.get(name, OPTIMIZERS["momentum"])
    update, unit, model, plain = make(make_optimizer, model_dtype=dtype, mixed=name == "mixed")
    if not known and update.needs_host(False):
        return
    reference = make_optimizer(plain.parameters())
    for _ in range(3):
        grads = give_gradients(model, unit, times=4.0)
        judged = verdict((float(update.squares()), 4, 0, 0, 0, 4), clip=0.3)
        update.apply(judged, judged.read() if known else None, 0.3, None)
        unit.drop_grads()
        for key, p in plain.named_parameters():
            p.grad = grads[key].to(p.dtype)
        nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        reference.step()
    for key, p in plain.named_parameters():
        exact = p.dtype is torch.float64
        found = model.get_parameter(key)
        assert found.dtype is p.dtype
        torch.testing.assert_close(found, p, rtol=1e-13 if exact else 1e-6, atol=1e-13 if exact else 1e-6)


@pytest.mark.parametrize("known", [True, False], ids=["host knows", "device only"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_first_step_leaves_no_trace(name, known) -> None:
    """Neither in the weights nor in the optimizer's state: the step after it is a first step."""
    update, unit, model, plain = make(OPTIMIZERS[name])
    if not known and update.needs_host(False):
        return
    reference = OPTIMIZERS[name](plain.parameters())
    give_gradients(model, unit, times=math.inf)
    judged = verdict((float(update.squares()), 1, 0, 0, 0, 1), check=True)
    update.apply(judged, judged.read() if known else None, 0.0, None)
    unit.drop_grads()
    assert torch.equal(model.weight, plain.weight)
    grads = give_gradients(model, unit)
    judged = verdict((float(update.squares()), 1, 0, 0, 0, 1), check=True)
    update.apply(judged, judged.read() if known else None, 0.0, None)
    for key, p in plain.named_parameters():
        p.grad = grads[key]
    reference.step()
    for key, p in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(key), p, rtol=1e-6, atol=1e-7)


def test_a_hook_sees_averaged_gradients_and_is_clipped_after() -> None:
    update, unit, model, plain = make(OPTIMIZERS["foreach"])
    grads = give_gradients(model, unit, times=2.0)
    seen = []

    def double() -> None:
        (run,) = update.runs
        seen.append(run.param.grad[:32].clone())
        run.param.grad.mul_(2.0)

    judged = verdict((float(update.squares()), 2, 0, 0, 0, 2), clip=1.0)
    update.apply(judged, judged.read(), 1.0, double)
    torch.testing.assert_close(seen[0], grads["weight"].flatten())
    reference = OPTIMIZERS["foreach"](plain.parameters())
    for key, p in plain.named_parameters():
        p.grad = 2 * grads[key]
    nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    reference.step()
    torch.testing.assert_close(model.weight, plain.weight, rtol=1e-5, atol=1e-6)


def test_an_optimizer_that_fails_leaves_no_gradients_attached() -> None:
    update, unit, model, _ = make(OPTIMIZERS["foreach"])
    give_gradients(model, unit)

    def fail() -> None:
        raise ZeroDivisionError

    judged = verdict((1, 1, 0, 0, 0, 1))
    with pytest.raises(ZeroDivisionError):
        update.apply(judged, judged.read(), 0.0, fail)
    assert not update.applying and all(run.param.grad is None for run in update.runs)


def test_low_precision_weights_follow_their_masters() -> None:
    update, unit, model, _ = make(lambda params: torch.optim.SGD(params, lr=2.0**-12, fused=True), torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    unit.adopt_edits(restorable=True)
    for _ in range(16):  # each step is lost in bf16 next to 1; sixteen of them are not
        model.weight.grad = torch.ones_like(model.weight)
        unit.reduce_scatter(1.0)
        judged = verdict((1, 1, 0, 0, 0, 1))
        update.apply(judged, judged.read(), 0.0, None)
        unit.drop_grads()
    assert float(model.weight.detach()[0, 0]) == float(torch.tensor(1 - 16 * 2.0**-12).bfloat16()) < 1.0


def test_who_needs_the_host() -> None:
    fused, foreach = (make(OPTIMIZERS[name])[0] for name in ("fused", "foreach"))
    assert not fused.needs_host(False) and fused.needs_host(True) and foreach.needs_host(False)
