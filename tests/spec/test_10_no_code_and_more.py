"""No code from data: ranks exchange numbers and JSON. And the rest of the list, each thing against the twin."""

from __future__ import annotations

import pickle
import sys
import traceback
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
import torch.nn.functional as F
from torch import nn

from tests.harness import DTYPES, STAGES, Setup, assert_close, check_against_twin, seeded, spread, start
from tests.models import (
    WIDTH,
    Branches,
    Doubles,
    Failing,
    Functional,
    Mlp,
    Nested,
    TinyGpt,
    Twice,
    TwoHeads,
    cross_entropy,
    mse,
    regression,
    tokens,
)

# --- no code from data ------------------------------------------------------------------------------------------------

WATCHED = {"pickle.find_class", "exec", "compile", "marshal.loads", "code.__new__"}
_heard: list[str] | None = None


def _listen(event, args):
    if _heard is not None and event in WATCHED:
        where = "".join(traceback.format_stack(limit=8)[:-1])
        _heard.append(f"{event} {str(args)[:80]}\n{where}")


def listen_to_initialize(batches, config):
    """What a second engine's life does, after a first one has imported all there is to import."""
    global _heard
    rank = dist.get_rank()

    def life():
        engine = start(TinyGpt, config)
        for window in batches:
            engine.backward(cross_entropy(engine, engine.module, window[0][rank]))
            engine.step()
        engine.full_state_dict()
        engine.destroy()

    life()
    sys.addaudithook(_listen)  # for the rest of this process: deaf again after this function
    loads, unpickler = pickle.loads, c10d._unpickler

    def heard(*args, **kwargs):
        _heard.append(f"unpickled\n{''.join(traceback.format_stack(limit=8)[:-1])}")
        return unpickler(*args, **kwargs)

    pickle.loads, c10d._unpickler = heard, heard  # plain values are unpickled without any audit event
    _heard = []
    try:
        life()
    finally:
        pickle.loads, c10d._unpickler = loads, unpickler
        said, _heard = _heard, None
    return said


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_unpickled_or_compiled(ranks, stage):
    setup = Setup("fp16", accumulation=1)
    for said in ranks(listen_to_initialize, 2, spread(tokens, 2, setup, 2), setup.config(stage)):
        assert not said, "\n".join(said)


def listen_to_an_object_exchange():
    """The same ears on what must not be used."""
    global _heard
    sys.addaudithook(_listen)
    _heard = []
    box = [partial(int, "7")] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(box)
    said, _heard = _heard, None
    return said


def test_the_listener_hears(ranks):
    assert any("pickle.find_class" in line for line in ranks(listen_to_an_object_exchange, 2)[1])


# --- the rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weight_used_outside_its_module(ranks, dtype):
    check_against_twin(ranks, Functional, cross_entropy, tokens, setup=Setup(dtype, "SGD", accumulation=2))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_module_called_twice(ranks, accumulation):
    check_against_twin(ranks, Twice, mse, regression, setup=Setup(accumulation=accumulation))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nested_blocks(ranks, dtype):
    check_against_twin(ranks, Nested, mse, regression, setup=Setup(dtype, "SGD", clip=0.3))


def test_nested_blocks_cut_small(ranks):
    setup = Setup(zero={"unit_max_numel": 1200})
    check_against_twin(ranks, Nested, mse, regression, setup=setup)


def test_fp64_parameters(ranks):
    check_against_twin(ranks, Doubles, mse, regression, setup=Setup("fp32", "SGD"))


def fp64_state(config):
    engine = start(Doubles, config)
    dtypes = {name: value.dtype for name, value in engine.full_state_dict().items()}
    live = engine.module.exact.dtype
    engine.destroy()
    return dtypes, live


@pytest.mark.parametrize("stage", STAGES)
def test_fp64_stays_fp64(ranks, stage):
    for dtypes, live in ranks(fp64_state, 2, Setup().config(stage)):
        assert dtypes["exact"] == live == torch.float64
        assert dtypes["head.weight"] == torch.float32


def whole_in_fp64():
    return Mlp(depth=2).double()


def double_mse(call, module, batch):
    return F.mse_loss(call(batch[0].double()), batch[1].double())


def test_a_model_in_fp64(ranks):
    """It computes in fp64 too, so its inputs must not be cast down."""
    setup = Setup("fp32", "SGD")
    batches = spread(regression, 3, setup, 2)
    twin = setup.twin(seeded(whole_in_fp64))
    twin.dtype = torch.float64
    for window in batches:
        for batch in window[0]:
            twin.backward(double_mse(twin, twin.model, batch))
        twin.step()
    for stage in STAGES:
        for state in ranks(train_in_fp64, 2, batches, setup.config(stage)):
            assert {value.dtype for value in state.values()} == {torch.float64}
            assert_close(state, twin.state())


def train_in_fp64(batches, config):
    rank = dist.get_rank()
    engine = start(whole_in_fp64, config)
    for window in batches:
        engine.backward(double_mse(engine, engine.module, window[0][rank]))
        engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return state


# different parameters unused on each rank

USES = [{0: ("left",), 1: ("right",)}, {0: ("left", "right"), 1: ()}, {0: (), 1: ()}, {0: ("right",), 1: ("left",)}]


def use_branches(batches, config):
    rank = dist.get_rank()
    engine = start(Branches, config)
    for use, window in zip(USES, batches, strict=True):
        for micro in window:
            x, y = micro[rank]
            engine.backward(F.mse_loss(engine(x, use=use[rank]).float(), y))
            engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return state


@pytest.mark.parametrize(("dtype", "optimizer", "accumulation"), [("fp32", "AdamW", 1), ("bf16", "SGD", 2)])
@pytest.mark.parametrize("stage", STAGES)
def test_different_parameters_unused_on_each_rank(ranks, stage, dtype, optimizer, accumulation):
    """`never` has a zero gradient everywhere, and decays as a zero gradient makes it."""
    setup = Setup(dtype, optimizer, accumulation=accumulation, clip=0.3)
    batches = spread(regression, len(USES), setup, 2)
    twin = setup.twin(seeded(Branches))
    before = twin.state()
    for use, window in zip(USES, batches, strict=True):
        for micro in window:
            for rank, (x, y) in enumerate(micro):
                twin.backward(F.mse_loss(twin.model(x.to(twin.dtype), use=use[rank]).float(), y))
        twin.step()
    for state in ranks(use_branches, 2, batches, setup.config(stage)):
        assert_close(state, twin.state(), dtype, before)


# two losses


def two_losses(how, batches, config):
    rank = dist.get_rank()
    engine = start(TwoHeads, config)
    for window in batches:
        for micro in window:
            x, y = micro[rank]
            if how == "two forwards":
                engine.backward(F.mse_loss(engine(x)[0].float(), y))
                engine.backward(F.mse_loss(engine(x)[1].float(), y) * 0.5)
            else:
                first, second = engine(x)
                engine.backward(F.mse_loss(first.float(), y), retain_graph=True)
                engine.backward(F.mse_loss(second.float(), y) * 0.5)
            engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return state


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("how", ["two forwards", "one graph"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_losses_and_two_backwards(ranks, stage, how, accumulation):
    """Backwards before a step add up: the gradient of the sum of the losses, averaged over micro-steps and ranks."""
    setup = Setup(accumulation=accumulation)
    batches = spread(regression, 3, setup, 2)
    twin = setup.twin(seeded(TwoHeads))
    for window in batches:
        for micro in window:
            for x, y in micro:
                first, second = twin(x)
                twin.backward(F.mse_loss(first, y) + F.mse_loss(second, y) * 0.5)
        twin.step()
    for state in ranks(two_losses, 2, how, batches, setup.config(stage)):
        assert_close(state, twin.state())


# two engines


class Judge(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(2))
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def gan_step(maker, judge, noise, real, update):
    """One step of both; `update(which, loss)` is what differs between engines and twins."""
    ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
    fake = maker(noise)
    update("maker", F.binary_cross_entropy_with_logits(judge(fake).float(), ones))
    told = F.binary_cross_entropy_with_logits(judge(real).float(), ones)
    told = told + F.binary_cross_entropy_with_logits(judge(fake.detach()).float(), zeros)
    update("judge", told)


def gan(batches, config):
    rank = dist.get_rank()
    maker, judge = start(partial(Mlp, WIDTH, 2), config), start(Judge, config)

    def update(which, loss):
        engine, other = (maker, judge) if which == "maker" else (judge, maker)
        engine.backward(loss)
        engine.step()
        other.zero_grad()

    for window in batches:
        gan_step(maker, judge, *window[0][rank], update)
    states = maker.full_state_dict(), judge.full_state_dict()
    maker.destroy()
    judge.destroy()
    return states


@pytest.mark.parametrize("stage", STAGES)
def test_two_engines_in_one_process(ranks, stage):
    """The maker's loss goes through the judge, whose gradients of it are discarded."""
    setup = Setup("fp32", "SGD")
    batches = spread(regression, 3, setup, 2)
    maker, judge = setup.twin(seeded(partial(Mlp, WIDTH, 2))), setup.twin(seeded(Judge))
    for window in batches:
        pieces = {"maker": [], "judge": []}
        fakes = [maker(noise) for noise, _ in window[0]]
        ones, zeros = torch.ones(setup.micro, 1), torch.zeros(setup.micro, 1)
        for fake in fakes:
            pieces["maker"].append(F.binary_cross_entropy_with_logits(judge(fake), ones))
        for loss in pieces["maker"]:
            maker.backward(loss)
        maker.step()
        judge.zero_grad()
        for fake, (_, real) in zip(fakes, window[0], strict=True):
            loss = F.binary_cross_entropy_with_logits(judge(real), ones)
            judge.backward(loss + F.binary_cross_entropy_with_logits(judge(fake.detach()), zeros))
        judge.step()
    for made, judged in ranks(gan, 2, batches, setup.config(stage)):
        assert_close(made, maker.state())
        assert_close(judged, judge.state())


def in_turn(batches, config_a, config_b):
    """Two unrelated engines with different configs, step by step in turn."""
    rank = dist.get_rank()
    first, second = start(Mlp, config_a), start(TinyGpt, config_b)
    for (a,), (b,) in batches:
        first.backward(mse(first, first.module, a[rank]))
        second.backward(cross_entropy(second, second.module, b[rank]))
        first.step()
        second.step()
    states = first.full_state_dict(), second.full_state_dict()
    first.destroy()
    second.destroy()
    return states


def test_two_engines_of_different_kinds(ranks):
    a, b = Setup("fp32", "AdamW"), Setup("bf16", "SGD", clip=0.3)
    batches = list(zip(spread(regression, 3, a, 2), spread(tokens, 3, b, 2), strict=True))
    first, second = a.twin(seeded(Mlp)), b.twin(seeded(TinyGpt))
    before = second.state()
    for (left,), (right,) in batches:
        for batch in left:
            first.backward(mse(first, first.model, batch))
        for batch in right:
            second.backward(cross_entropy(second, second.model, batch))
        first.step()
        second.step()
    for mlp, gpt in ranks(in_turn, 2, batches, a.config(3), b.config(1)):
        assert_close(mlp, first.state())
        assert_close(gpt, second.state(), "bf16", before)


# an exception, then another step


def fail_then_go_on(batches, config):
    rank = dist.get_rank()
    engine = start(Failing, config)
    failures = 0
    for step, window in enumerate(batches):
        for micro in window:
            x, y = micro[rank]
            if step == 1:
                try:
                    engine(x, fail=True)
                except ValueError as error:
                    failures += str(error) == "as asked"
            engine.backward(F.mse_loss(engine(x).float(), y))
            engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return failures, state


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_exception_in_forward_then_another_step(ranks, stage, accumulation):
    setup = Setup(accumulation=accumulation)
    batches = spread(regression, 3, setup, 2)
    twin = setup.twin(seeded(Failing))
    for window in batches:
        for micro in window:
            for batch in micro:
                twin.backward(mse(twin, twin.model, batch))
        twin.step()
    for failures, state in ranks(fail_then_go_on, 2, batches, setup.config(stage)):
        assert failures == accumulation
        assert_close(state, twin.state())


class BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ValueError("as asked, in backward")


def fail_in_backward(batches, config):
    rank = dist.get_rank()
    engine = start(Mlp, config)
    failures = 0
    for step, window in enumerate(batches):
        x, y = window[0][rank]
        if step == 1:
            out = engine.module.blocks[0](BadBackward.apply(engine(x)))
            try:
                engine.backward(F.mse_loss(out.float(), y))
            except ValueError:
                failures += 1
            engine.zero_grad()
        engine.backward(F.mse_loss(engine(x).float(), y))
        engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return failures, state


@pytest.mark.parametrize("stage", STAGES)
def test_exception_in_backward_then_another_step(ranks, stage):
    """What was accumulated before it is discarded by `zero_grad`."""
    setup = Setup()
    batches = spread(regression, 3, setup, 2)
    twin = setup.twin(seeded(Mlp))
    for window in batches:
        for batch in window[0]:
            twin.backward(mse(twin, twin.model, batch))
        twin.step()
    for failures, state in ranks(fail_in_backward, 2, batches, setup.config(stage)):
        assert failures == 1
        assert_close(state, twin.state())


# generation between steps


def generate_between(batches, config):
    """Each rank generates its own number of tokens: forwards that differ in number run where nothing is gathered."""
    rank = dist.get_rank()
    engine = start(TinyGpt, config)
    said = []
    for window in batches:
        engine.backward(cross_entropy(engine, engine.module, window[0][rank]))
        engine.step()
        with engine.gathered_parameters():
            said.append(engine.generate(window[0][rank][0][:2], 3 + 2 * rank))
    state = engine.full_state_dict()
    engine.destroy()
    return said, state


@pytest.mark.parametrize("stage", STAGES)
def test_generation_between_steps(ranks, stage):
    setup = Setup()
    batches = spread(tokens, 3, setup, 2)
    twin = setup.twin(seeded(TinyGpt))
    expected = {0: [], 1: []}
    for window in batches:
        for batch in window[0]:
            twin.backward(cross_entropy(twin, twin.model, batch))
        twin.step()
        for rank, (ids, _) in enumerate(window[0]):
            expected[rank].append(twin.model.generate(ids[:2], 3 + 2 * rank))
    for rank, (said, state) in enumerate(ranks(generate_between, 2, batches, setup.config(stage))):
        assert all(torch.equal(a, b) for a, b in zip(said, expected[rank], strict=True))
        assert_close(state, twin.state())


def generate_alike(batches, config):
    rank = dist.get_rank()
    engine = start(TinyGpt, config)
    said = []
    for window in batches:
        said.append(engine.generate(window[0][rank][0][:2], 4))
        engine.backward(cross_entropy(engine, engine.module, window[0][rank]))
        engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return said, state


@pytest.mark.parametrize("stage", [0, 3])
def test_generation_of_equal_length_needs_no_context(ranks, stage):
    """`model.generate()` reaches the blocks without the root's forward having been called through the engine."""
    setup = Setup("bf16", "SGD")
    batches = spread(tokens, 3, setup, 2)
    twin = setup.twin(seeded(TinyGpt))
    before = twin.state()
    for window in batches:
        for batch in window[0]:
            twin.backward(cross_entropy(twin, twin.model, batch))
        twin.step()
    for said, state in ranks(generate_alike, 2, batches, setup.config(stage)):
        assert [ids.shape for ids in said] == [(2, 12)] * 3
        assert_close(state, twin.state(), "bf16", before)
