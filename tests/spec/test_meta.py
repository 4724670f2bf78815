"""A model created on `meta` at stage 3: built unit by unit, never whole, and equal to the ordinary construction."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.features.test_meta import LibraryModel, Outer
from tests.harness import STAGES, Setup, assert_close, assert_identical, assert_ranks_agree, live_bytes, seeded, spread
from tests.models import LateInit, Mlp, Orphan, cross_entropy, tokens


def from_meta(build, batches, config, kwargs):
    import shardline

    rank = dist.get_rank()
    torch.manual_seed(0)
    with torch.device("meta"):
        model = build()
    torch.manual_seed(0)
    engine, *_ = shardline.initialize(model=model, config=config, **kwargs)
    begin = engine.full_state_dict()
    for window in batches:
        engine.backward(cross_entropy(engine, engine.module, window[0][rank]))
        engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return begin, state


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_reset_parameters_with_the_same_seed(ranks, world, dtype):
    setup = Setup(dtype)
    batches = spread(tokens, 2, setup, world)
    twin = setup.twin(seeded(LateInit))
    before = twin.state()
    for window in batches:
        for batch in window[0]:
            twin.backward(cross_entropy(twin, twin.model, batch))
        twin.step()
    results = ranks(from_meta, world, LateInit, batches, setup.config(3), {})
    for begin, state in results:
        assert_identical(begin, before)
        assert_close(state, twin.state(), dtype, before)
    assert_ranks_agree([state for _, state in results])


@pytest.mark.parametrize("stage", STAGES[:3])
def test_other_stages(ranks, stage):
    """Built in the same way, or refused with the reason."""
    setup = Setup()
    for error, begin in ranks(begin_or_error, 2, LateInit, setup.config(stage), {}):
        if error is None:
            assert_identical(begin, seeded(LateInit).state_dict())
        else:
            assert "meta" in error and "stage 3" in error


def begin_or_error(build, config, kwargs):
    import shardline

    with torch.device("meta"):
        model = build()
    torch.manual_seed(0)
    try:
        engine, *_ = shardline.initialize(model=model, config=config, **kwargs)
    except shardline.errors.ShardlineError as error:
        return str(error), None
    begin = engine.full_state_dict()
    engine.destroy()
    return None, begin


def init_by_hand(module):
    """As ``nn.Module.apply`` would call it: once for each module that holds something."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.05)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.uniform_(module.weight, -0.1, 0.1)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, Orphan):
        nn.init.constant_(module.orphan, 3.0)


def test_init_fn(ranks):
    expected = seeded(Orphan)
    torch.manual_seed(0)
    expected.apply(init_by_hand)
    by_name = expected.state_dict()
    for error, begin in ranks(begin_or_error, 2, Orphan, Setup().config(3), {"init_fn": init_by_hand}):
        assert error is None
        assert begin.keys() == by_name.keys()
        assert torch.equal(begin["orphan"], torch.full((7,), 3.0))
        for name, value in begin.items():  # the order of modules is the engine's affair; the distribution is not
            assert value.isfinite().all()
            assert abs(value.std(correction=0) - by_name[name].std(correction=0)) < 0.02


def test_what_stays_unwritten_is_named(ranks):
    for error, _ in ranks(begin_or_error, 2, Orphan, Setup().config(3), {}):
        assert error is not None and "orphan" in error


def forget_the_orphan(module):
    """`reset_parameters` has written the rest before."""
    if not isinstance(module, Orphan):
        init_by_hand(module)


def test_what_init_fn_forgets_is_named(ranks):
    for error, _ in ranks(begin_or_error, 2, Orphan, Setup().config(3), {"init_fn": forget_the_orphan}):
        assert error is not None and "orphan" in error


class Buffered(nn.Module):
    """BatchNorm's statistics are buffers, which `reset_parameters` writes too."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32)) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_buffers(ranks):
    for error, begin in ranks(begin_or_error, 2, Buffered, Setup().config(3), {}):
        assert error is None
        assert_identical(begin, seeded(Buffered).state_dict())


class BufferedOrphan(Mlp):
    def __init__(self):
        super().__init__(depth=1)
        self.register_buffer("table", torch.arange(5.0))


def test_an_unwritten_buffer_is_named(ranks):
    for error, _ in ranks(begin_or_error, 2, BufferedOrphan, Setup().config(3), {}):
        assert error is not None and "table" in error


class Partial(nn.Module):
    """Real parameters and ones on `meta` in one unit; an initialiser that reaches into its children."""

    def __init__(self):
        super().__init__()
        self.words, self.linear = nn.Embedding(40, 16), nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.tensor(2.5))
        nn.init.constant_(self.linear.bias, -2.0)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, Partial):
            nn.init.normal_(module.words.weight, std=0.02)


def begin_all(stages, dtypes):
    """What engines begin with: two kinds of models that initialise themselves, and one that is on `meta` in part."""
    import shardline

    found = []
    for stage in stages:
        for dtype in dtypes:
            config = Setup(dtype).config(stage)
            states = [begin_or_error(build, config, {})[1] for build in (LibraryModel, Outer)]
            with shardline.empty_weights(min_numel=256):
                model = Partial()
            torch.manual_seed(5)
            engine, *_ = shardline.initialize(model=model, config=config)
            states.append(engine.full_state_dict())
            engine.destroy()
            found.append(states)
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_a_models_own_initialiser_at_every_stage(ranks, world):
    expected = [seeded(LibraryModel).state_dict(), seeded(Outer).state_dict()]
    for result in ranks(begin_all, world, STAGES, ["fp32", "bf16"]):
        for library, outer, partial in result:
            assert_identical(library, expected[0])  # masters: no rounding on the way
            assert_identical(outer, expected[1])
            assert_identical(partial, result[0][2])
            assert partial["scale"] == 2.5 and bool((partial["linear.bias"] == -2.0).all())
            assert 0.018 < partial["words.weight"].std() < 0.022


WIDTH, DEPTH = 128, 16


class Tall(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))


_most = 0


def measure_then_init(module):
    global _most
    if isinstance(module, nn.Linear):
        module.reset_parameters()
        _most = max(_most, live_bytes())


def measure_meta(config):
    global _most
    before = _most = live_bytes()
    error, _ = begin_or_error(Tall, config, {"init_fn": measure_then_init})
    assert error is None, error
    return _most - before


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_never_whole(ranks, world):
    """At each module's initialisation a rank holds its shard of what is done and two units at most, not the model."""
    unit = 4 * (WIDTH * WIDTH + WIDTH)
    for most in ranks(measure_meta, world, Setup().config(3)):
        assert unit <= most <= DEPTH * unit / world + 2 * unit + 16_384
