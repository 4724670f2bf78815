"""fp16: one scale for each backward, whatever began it and whatever lies in its graph."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tests.harness import Setup, seeded, start
from tests.models import Block

WIDTH = 32
LR = 1.0


class Net(nn.Module):
    """With a method of its own, and an output beside the one it is made of."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH)

    def encode(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x):
        hidden = self.encode(x)
        return self.head(hidden), hidden


def config(stage, power):
    setup = Setup("fp16", scale_power=power, more={"optimizer": {"type": "SGD", "params": {"lr": LR}}})
    return setup.config(stage)


def data():
    g = torch.Generator().manual_seed(7 + dist.get_rank())
    return torch.randn(4, WIDTH, generator=g).half(), torch.randn(4, WIDTH, generator=g)


def grads_in_fp32(model, make, times=1):
    """Gradients of the mean over ranks, by plain torch."""
    model = copy.deepcopy(model).float()
    for _ in range(times):
        make(model).backward()
    found = {}
    for name, param in model.named_parameters():
        grad = torch.zeros_like(param) if param.grad is None else param.grad
        dist.all_reduce(grad)
        found[name] = grad / dist.get_world_size()
    return found


def off(engine, before, wanted):
    """How far the step went from ``-LR * wanted``, relative to that."""
    moved = {name: before[name] - value for name, value in engine.full_state_dict().items()}
    distance = sum(float((moved[name] - LR * grad).square().sum()) for name, grad in wanted.items())
    return (distance / sum(float((LR * grad).square().sum()) for grad in wanted.values())) ** 0.5


# --- one engine, plain backward ---------------------------------------------------------------------------------------


def simple(call, model, x, y):
    return F.mse_loss(call(x)[0].float(), y)


def changed_in_place(call, model, x, y):
    out, _ = call(x)
    return F.mse_loss(out.mul_(2.0).float(), y)


def one_of_two_changed(call, model, x, y):
    out, hidden = call(x)
    first = (3.0 * out.float()).mean()
    out.add_(1.0)
    return F.mse_loss(out.float(), y) + first + hidden.float().square().mean()


def through_the_module(call, model, x, y):
    return F.mse_loss(model(x)[0].float(), y)


def through_a_method(call, model, x, y):
    return F.mse_loss(model.encode(x).float(), y)


def by_both_ways(call, model, x, y):
    return simple(call, model, x, y) + through_a_method(call, model, x, y)


def with_a_penalty(call, model, x, y):
    return simple(call, model, x, y) + 0.1 * model.head.weight.float().square().sum()


def again_on_its_output(call, model, x, y):
    first, _ = call(x)
    return F.mse_loss(call(first)[0].float(), y) + F.mse_loss(first.float(), y)


LOSSES = (simple, changed_in_place, one_of_two_changed, through_the_module, through_a_method, by_both_ways,
          with_a_penalty, again_on_its_output)  # fmt: skip


def plainly(stage):
    x, y = data()
    said = {}
    for loss_of in LOSSES:
        if stage == 3 and loss_of is with_a_penalty:
            continue  # a weight outside of its module is not here
        engine = start(Net, config(stage, 12))
        told = []
        engine.events.subscribe(lambda event, told=told: told.append(getattr(event, "message", "")))
        before = engine.full_state_dict()
        wanted = grads_in_fp32(seeded(Net), lambda m, loss_of=loss_of: loss_of(m, m, x.float(), y))
        source = x.clone().requires_grad_()
        loss_of(engine, engine.module, source, y).backward()
        engine.step()
        said[loss_of.__name__] = (
            off(engine, before, wanted),
            engine.skipped_steps,
            sum("engine.backward(loss)" in each for each in told),
            float(source.grad.float().norm()),
        )
        engine.destroy()
    return said


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 0), (2, 2), (2, 3)])
def test_a_plain_backward_is_right_whatever_lies_beside_the_outputs(ranks, world, stage) -> None:
    for said in ranks(plainly, world, stage):
        for name, (error, skipped, notices, source) in said.items():
            assert error < 1e-2 and not skipped, (name, error)
            assert notices == 1, name
            assert source < 10, f"{name}: the gradient of an input is not an engine's, and is scaled"


# --- gradients that are there before a scaled backward ---------------------------------------------------------------


def by_hand(stage):
    """``p.grad`` written by hand, alone and before a backward of the engine's; a plain backward before one."""
    x, y = data()
    said = {}
    for how in ("by hand", "by hand, then a backward", "by a method, then a backward"):
        engine = start(Net, config(stage, 10))
        before = engine.full_state_dict()
        wanted = grads_in_fp32(seeded(Net), lambda m: simple(m, m, x.float(), y))
        if how == "by hand":
            wanted = {name: torch.zeros_like(value) for name, value in wanted.items()}
        if how == "by a method, then a backward":
            more = grads_in_fp32(seeded(Net), lambda m: through_a_method(m, m, x.float(), y))
            wanted = {name: value + more[name] for name, value in wanted.items()}
            through_a_method(engine, engine.module, x, y).backward()
        else:
            bias = engine.module.head.bias
            bias.grad = torch.full_like(bias, 0.25) if stage < 3 else torch.full(bias.shape, 0.25, dtype=bias.dtype)
            wanted["head.bias"] = wanted["head.bias"] + 0.25
        if how != "by hand":
            engine.backward(simple(engine, engine.module, x, y))
        engine.step()
        said[how] = off(engine, before, wanted)
        engine.destroy()
    return said


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 1), (2, 3)])
def test_gradients_of_another_scale_do_not_mix(ranks, world, stage) -> None:
    for said in ranks(by_hand, world, stage):
        assert all(error < 1e-2 for error in said.values()), said


# --- two engines in one graph ----------------------------------------------------------------------------------------


def critic():
    return Net(seed=1)


def adversarial(make, judge, x, y):
    return judge(make(x)[0])[0].float().square().mean()


def with_a_distance(make, judge, x, y):
    """As pix2pix: what enters the first engine's output comes from the loss as well."""
    fake = make(x)[0]
    return judge(fake)[0].float().square().mean() + F.mse_loss(fake.float(), y)


def by_a_method(make, judge, x, y):
    encode = make.encode
    return judge(encode(x))[0].float().square().mean()


def two_engines(stages, powers, overflow):
    x, y = data()
    said = {}
    for loss_of in (adversarial, with_a_distance, by_a_method):
        for how in ("first", "second", "plain"):
            first, second = start(Net, config(stages[0], powers[0])), start(critic, config(stages[1], powers[1]))
            engines = {"first": first, "second": second}
            if overflow:  # the second alone, until its scale fits
                while second.skipped_steps < 2:
                    second.backward(float(2**overflow) * simple(second, second.module, x, y))
                    second.step()
            scales = [engine.loss_scale for engine in engines.values()]
            nets = {"first": seeded(Net).float(), "second": critic().float()}
            for name, engine in engines.items():  # the overflows have changed nothing
                nets[name].load_state_dict(
                    {key: value.half().float() for key, value in engine.full_state_dict().items()}
                )
            before = {name: engine.full_state_dict() for name, engine in engines.items()}
            wanted = {}
            judge, make = nets["second"], nets["first"]
            wanted = {
                "first": grads_in_fp32(make, partial(loss_of, judge=judge, x=x.float(), y=y)),
                "second": grads_in_fp32(judge, lambda m, f=loss_of, make=make: f(make, m, x.float(), y)),
            }
            loss = loss_of(first, second, x, y)
            loss.backward() if how == "plain" else engines[how].backward(loss)
            for name, engine in engines.items():
                skipped = engine.skipped_steps
                engine.step()
                said[loss_of.__name__, how, name] = (
                    off(engine, before[name], wanted[name]),
                    engine.skipped_steps - skipped,
                )
            said[loss_of.__name__, how, "scales"] = scales
            first.destroy()
            second.destroy()
    return said


@pytest.mark.parametrize(
    ("world", "stages", "powers", "overflow"),
    [(1, (0, 0), (6, 11), 0), (2, (2, 2), (6, 11), 0), (2, (3, 1), (11, 6), 0), (2, (0, 3), (9, 9), 40)],
)
def test_two_engines_in_one_graph(ranks, world, stages, powers, overflow) -> None:
    for said in ranks(two_engines, world, stages, powers, overflow):
        for (*what, name), found in said.items():
            if name == "scales":
                assert found[0] == 2.0 ** powers[0] and found[0] != found[1], found
            else:
                assert found[0] < 1e-2 and not found[1], (what, name, found)


def overflow_of_one():
    """The first engine's scale is far too large for this graph, the second's is not."""
    x, y = data()
    first, second = start(Net, config(0, 32)), start(critic, config(0, 6))
    second.backward(adversarial(first, second, x, y))
    first.step()
    second.step()
    said = first.skipped_steps, second.skipped_steps, first.loss_scale, second.loss_scale
    first.destroy()
    second.destroy()
    return said


def test_each_engine_judges_its_own_overflow(ranks) -> None:
    assert ranks(overflow_of_one, 2) == [(1, 0, 2.0**31, 2.0**6)] * 2


def accumulating(config_of):
    """Two engines that accumulate: the loss is divided once, by either's steps."""
    x, y = (each.float() for each in data())
    first, second = start(Net, config_of), start(critic, config_of)
    before = first.full_state_dict()
    wanted = grads_in_fp32(seeded(Net), lambda m: adversarial(m, critic().float(), x.float(), y))
    for _ in range(3):
        second.backward(adversarial(first, second, x, y))
        first.step()
        second.step()
    error = off(first, before, wanted)
    first.destroy()
    second.destroy()
    return error


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_two_engines_that_accumulate(ranks, dtype) -> None:
    setup = Setup(dtype, accumulation=3, more={"optimizer": {"type": "SGD", "params": {"lr": LR}}})
    assert all(error < 1e-2 for error in ranks(accumulating, 2, setup.config(1)))
