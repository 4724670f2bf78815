"""``engine.compile()``: the same training, one compilation for all blocks of a shape, no weights kept by it."""

from __future__ import annotations

import copy
import itertools
import pickle
import shutil
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters

import shardline
from shardline.errors import UsageError
from shardline.features.compiling import compile_blocks, is_compiled
from shardline.plan import UnitPlan
from tests.harness import STAGES, Setup, assert_close, assert_identical, full, spread, start
from tests.models import Block, ConvNet, Mlp, TinyGpt, cross_entropy, images, mse, regression, tokens


def classes(call, module, batch):
    return torch.nn.functional.cross_entropy(call(batch[0]).float(), batch[1])


CASES = {
    "gpt": (TinyGpt, cross_entropy, tokens),
    "no blocks": (ConvNet, classes, images),
    "mlp": (Mlp, mse, regression),
}


def _job(case, stage, setup, compiled, backend="aot_eager", before=None, steps=2):
    """Train on this rank; per step the loss, then the weights, and how often dynamo compiled."""
    torch._dynamo.reset()
    counters.clear()
    build, loss_of, make = CASES[case]

    def prepared():
        model = build()
        if before == "whole":
            return torch.compile(model, backend=backend)
        for index, block in enumerate(model.blocks if before else ()):
            if before == "wrapped":
                model.blocks[index] = torch.compile(block, backend=backend)
            else:
                block.compile(backend=backend)
        return model

    engine = start(prepared, setup.config(stage))
    if compiled:
        engine.compile(backend=backend)
    losses = []
    for window in spread(make, steps, setup, dist.get_world_size()):
        for micro in window:
            loss = loss_of(engine, engine.module, micro[dist.get_rank()])
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    state = {name.replace("_orig_mod.", ""): value for name, value in engine.full_state_dict().items()}
    engine.destroy()
    return losses, state, counters["stats"]["unique_graphs"]


def _compare(case, dtype, *ways):
    """On a rank: both ways at every stage."""
    setup = Setup(dtype=dtype, accumulation=2)
    return [[_job(case, stage, setup, *way) for way in ways] for stage in STAGES]


MORE = [("fp32", 1), ("bf16", 1), ("bf16", 2)]


@pytest.mark.parametrize(
    ("dtype", "world"), [("fp32", 2), *(pytest.param(*way, marks=pytest.mark.slow) for way in MORE)]
)
def test_compiled_is_the_same_at_every_stage(ranks, dtype, world) -> None:
    for result in ranks(_compare, world, "gpt", dtype, (False,), (True,)):
        for (losses, state, none), (compiled_losses, compiled_state, graphs) in result:
            assert compiled_losses == losses
            assert_identical(compiled_state, state)
            assert (none, graphs) == (0, 1), "two blocks of one shape, four forwards: one graph"


def test_a_model_without_blocks_is_compiled_unit_by_unit(ranks) -> None:
    for result in ranks(_compare, 2, "no blocks", "fp32", (False,), (True, "eager")):
        for (losses, state, _), (compiled_losses, compiled_state, graphs) in result:
            assert compiled_losses == losses
            assert_identical(compiled_state, state)
            assert graphs == 5


def test_blocks_that_the_user_compiled(ranks) -> None:
    ways = [(False,), *((False, "eager", before) for before in ("wrapped", "in place", "whole"))]
    for result in ranks(_compare, 2, "mlp", "fp32", *ways):
        for (losses, state, _), *others in result:
            for compiled_losses, compiled_state, graphs in others:
                assert compiled_losses == losses
                assert_identical(compiled_state, state)
                assert graphs > 0


AROUND = ("plain", "model before", "model after", "blocks after", "function", "step", "engine")


def _around(stage, what):
    """Losses of a loop where the user compiled ``what``, which has the engine's hooks inside. Blocks are many, so that
    tracing a hook would compile it again for each."""
    torch._dynamo.reset()
    compiled = partial(torch.compile, backend="aot_eager")
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(12)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {"zero_optimization": {"stage": stage, "unit_min_numel": 1, "stage3_param_persistence_threshold": 0}}
    call = compiled(model) if what == "model before" else model
    if what == "engine":
        engine, *_ = shardline.initialize(
            model=model, optimizer=optimizer, config={"train_micro_batch_size_per_gpu": 4, **config}
        )
        call = compiled(engine)
    else:
        engine = shardline.shard(model, optimizer, config)
    if what == "model after":
        call = compiled(model)
    if what == "blocks after":
        for block in model:
            block.compile(backend="aot_eager")
    if what == "function":
        call = compiled(lambda x: model(x))

    def step(x):
        loss = call(x).pow(2).mean()
        if what == "engine":
            engine.backward(loss)
            engine.step()
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss

    run = compiled(step) if what == "step" else step
    losses = [run(torch.randn(4, 8, generator=torch.Generator().manual_seed(turn))).item() for turn in range(3)]
    engine.destroy()
    return losses


def _all_around(stages):
    return [[_around(stage, what) for what in AROUND] for stage in stages]


def test_what_the_user_compiles_around_the_engine_does_not_trace_it(ranks) -> None:
    for found in ranks(_all_around, 2, (2, 3)):
        for plain, *others in found:
            for what, losses in zip(AROUND[1:], others, strict=True):
                assert losses == plain, what


def _taken_apart():
    setup = Setup(zero={"unit_max_numel": 1500})  # a linear layer of 32x32 is a unit, a block of two is not
    return [_job("mlp", 3, setup, compiled) for compiled in (False, True)], len(_roots(setup))


def _roots(setup):
    engine = start(Mlp, setup.config(3))
    engine.compile(backend="eager")
    found = [path for path, module in engine.module.named_modules() if is_compiled(module)]
    engine.destroy()
    return found


def test_a_block_of_several_units_is_compiled_in_parts(ranks) -> None:
    for ((losses, state, _), (compiled_losses, compiled_state, _)), parts in ranks(_taken_apart):
        assert compiled_losses == losses
        assert_identical(compiled_state, state)
        assert parts == 8


def _kept_after_forward(compiled):
    """Pieces of memory that gathers used, and how many of them are still held once the forward is over."""
    engine = start(lambda: Mlp(width=160), Setup().config(3))
    if compiled:
        engine.compile(backend="aot_eager")
    pool = engine.trainables.layout.pool
    for _ in range(2):
        loss = mse(engine, engine.module, regression(4, width=160))
        deadline = time.monotonic() + 5  # a transport's thread releases it a moment after its work is done
        while (held := _held(pool)) and time.monotonic() < deadline:
            time.sleep(0.01)
        found = len(pool._free), held, [unit.residence.value for unit in engine.trainables.layout.units if unit.sharded]
        engine.backward(loss)
        engine.step()
    engine.destroy()
    return found


def _held(pool):
    return sum(torch._C._storage_Use_Count(memory._cdata) > 1 for memory in pool._free)


def test_gathered_weights_are_given_back_between_forward_and_backward(ranks) -> None:
    for pieces, held, residences in ranks(_kept_after_forward, 2, True):
        assert pieces > 0 and held == 0
        assert residences.count("gathered, sealed") == 1  # what was used last stays, sealed, for the backward
        assert residences.count("sharded") == len(residences) - 1


def _surface():
    engine = start(Mlp, Setup().config(0))
    ordinary = engine.module.blocks[0].forward
    engine.compile(backend="eager")
    compiled = [is_compiled(block) for block in engine.module.blocks], is_compiled(engine.module.head)
    twin = copy.deepcopy(engine.module)
    read = pickle.loads(pickle.dumps(engine.module))
    x = regression(2)[0]
    with torch.no_grad():
        expected = engine(x)
        for param in engine.module.blocks[0].parameters():
            param.zero_()  # a copy that ran the original's code on the original's weights would notice
        copies = [torch.equal(expected, model(x)) and not is_compiled(model.blocks[0]) for model in (twin, read)]
    errors = []
    for step in ("again", "destroyed"):
        if step == "destroyed":
            engine.destroy()
        try:
            engine.compile()
        except UsageError as error:
            errors.append(str(error))
    block = engine.module.blocks[0]
    return compiled, copies, errors, block.forward == ordinary and "forward" not in vars(block)


def test_copies_are_not_compiled_and_destroy_restores(ranks) -> None:
    (compiled, copies, errors, restored) = ranks(_surface, 1)[0]
    assert compiled == ([True] * 4, False)
    assert copies == [True, True]
    assert "a second time" in errors[0] and "destroy()" in errors[1]
    assert restored


def test_nothing_to_compile() -> None:
    model = torch.compile(Block(), backend="eager")
    with pytest.raises(UsageError, match="nothing that it could compile"):
        compile_blocks(model, [UnitPlan(0, "a", (), ("",), ("",))], (), {})


def test_a_forward_of_the_modules_own_is_restored() -> None:
    model = Block()
    own = model.forward = lambda x: x + 1
    undo = compile_blocks(model, [UnitPlan(0, "a", (), ("",), ("",))], (), {"backend": "eager"})
    assert is_compiled(model) and model(torch.ones(1)).item() == 2
    undo()
    assert model.forward is own


@full
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_inductor(ranks) -> None:
    for stage, dtype in itertools.product((0, 3), ("fp32", "bf16")):
        setup = Setup(dtype=dtype)
        before = setup.twin(_seeded()).state()
        plain = ranks(_job, 2, "gpt", stage, setup, False)[0]
        compiled = ranks(_inductor, 2, stage, setup, timeout=300)[0]
        assert compiled[2] == 1
        torch.testing.assert_close(compiled[0], plain[0], rtol=2e-2, atol=2e-2)
        # fused code rounds to bf16 less often
        assert_close(compiled[1], plain[1], dtype, before, times=1.0 if dtype == "fp32" else 4.0)


def _seeded():
    torch.manual_seed(0)
    return TinyGpt()


def _inductor(stage, setup):
    import torch._inductor.config

    with torch._inductor.config.patch(compile_threads=1):  # no processes of its own
        return _job("gpt", stage, setup, True, "inductor")
