"""Uneven: 101 samples in global batches of 12 on 1, 2, 3 and 8 ranks; each step is the sample-weighted mean."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import Dataset

from tests.harness import STAGES, Setup, assert_close, full, seeded, start
from tests.models import Mlp, regression

SAMPLES, GLOBAL, EPOCHS = 101, 12, 2
WORLDS = [1, 2, 3, pytest.param(8, marks=full)]


class Numbered(Dataset):
    """Sample i and i itself, so that a batch says where it came from."""

    def __init__(self):
        self.x, self.y = regression(SAMPLES, seed=5)

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        return self.x[i], self.y[i], i


def uneven_config(setup, stage, accumulation):
    config = setup.config(stage)
    del config["train_micro_batch_size_per_gpu"]
    return config | {
        "train_batch_size": GLOBAL,
        "gradient_accumulation_steps": accumulation,
        "data_loader": {"uneven": True},
    }


def two_epochs(config):
    """Per step of this rank: the indices of its samples, and the weights after it."""
    import shardline

    engine, _, loader, _ = shardline.initialize(model=seeded(Mlp), training_data=Numbered(), config=config)
    steps, indices = [], []
    for _ in range(EPOCHS):
        for x, y, i in loader:
            engine.backward(F.mse_loss(engine(x).float(), y))
            engine.step()
            indices += i.tolist() if loader.samples else []
            if engine.global_steps > len(steps):
                steps.append((indices, engine.full_state_dict()))
                indices = []
    samples = engine.global_samples
    engine.destroy()
    return steps, indices, samples


def check_epochs(steps_of_ranks):
    """The global batches, after checking that each epoch meets each sample once."""
    batches = [sorted(i for indices in step for i in indices) for step in zip(*steps_of_ranks, strict=True)]
    sizes = [GLOBAL] * (SAMPLES // GLOBAL) + [SAMPLES % GLOBAL]
    assert [len(batch) for batch in batches] == sizes * EPOCHS
    for epoch in range(EPOCHS):
        seen = [i for batch in batches[epoch * len(sizes) : (epoch + 1) * len(sizes)] for i in batch]
        assert sorted(seen) == list(range(SAMPLES))
    return batches


SEQUENCES = []
"""The sequences of global batches of all worlds seen so far: there is only one."""


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", WORLDS)
def test_each_step_is_the_mean_over_its_samples(ranks, world, stage, accumulation):
    setup = Setup()
    results = ranks(two_epochs, world, uneven_config(setup, stage, accumulation), timeout=100)
    batches = check_epochs([[indices for indices, _ in steps] for steps, _, _ in results])
    assert all(left == [] for _, left, _ in results), "samples were carried over silently"
    assert batches[: len(batches) // EPOCHS] != batches[len(batches) // EPOCHS :], "not reshuffled"
    SEQUENCES.append(batches)
    assert batches == SEQUENCES[0], "the global batches depend on the world size, the stage or the accumulation"
    twin, data = setup.twin(seeded(Mlp)), Numbered()
    for step, batch in enumerate(batches):
        twin.backward(F.mse_loss(twin(data.x[batch]), data.y[batch]))  # one batch, one mean: nothing to weight
        twin.step()
        for steps, _, _ in results:
            assert_close(steps[step][1], twin.state())
    assert all(samples == SAMPLES * EPOCHS for _, _, samples in results)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_loader_alone(world, accumulation):
    """Eight ranks in one process: weight times mean, summed over ranks and divided by the weights, is the mean."""
    from shardline.data import Loader

    loaders = [
        Loader(
            Numbered(),
            global_batch=GLOBAL,
            micro_batch=-(-GLOBAL // (world * accumulation)),
            accumulation=accumulation,
            rank=rank,
            world_size=world,
            seed=1234,
        )
        for rank in range(world)
    ]
    per_rank = [[], [], [], [], [], [], [], []][:world]
    for _ in range(EPOCHS):
        for rank, loader in enumerate(loaders):
            micro = [(x, y, i.tolist() if loader.samples else [], loader.weight, loader.samples) for x, y, i in loader]
            assert len(micro) == len(loader) == accumulation * -(-SAMPLES // GLOBAL)
            per_rank[rank] += [micro[k : k + accumulation] for k in range(0, len(micro), accumulation)]
    check_epochs([[[i for m in window for i in m[2]] for window in windows] for windows in per_rank])
    data = Numbered()
    for step in zip(*per_rank, strict=True):
        pieces = [piece for window in step for piece in window]
        assert sum(piece[4] for piece in pieces) == sum(len(piece[2]) for piece in pieces)
        assert all((weight == 0) == (count == 0) for *_, weight, count in pieces)
        total = sum(weight * (x.sum(0) / len(x) + y.sum(0) / len(y)) for x, y, _, weight, _ in pieces)
        whole = [i for piece in pieces for i in piece[2]]
        expected = data.x[whole].mean(0) + data.y[whole].mean(0)
        torch.testing.assert_close(total / sum(piece[3] for piece in pieces), expected, rtol=1e-5, atol=1e-6)


# --- by token counts --------------------------------------------------------------------------------------------------


def counted(steps, accumulation, world):
    """Batches of very different sizes; rank 1 of the second step has nothing at all."""
    sizes = torch.randint(1, 9, (steps, accumulation, world), generator=torch.Generator().manual_seed(3))
    if world > 1:
        sizes[1, :, 1] = 0
    return [
        [[regression(int(n), seed=100 * s + 10 * m + r) for r, n in enumerate(row)] for m, row in enumerate(window)]
        for s, window in enumerate(sizes)
    ]


def by_count(batches, config):
    rank = dist.get_rank()
    engine = start(Mlp, config)
    for window in batches:
        for micro in window:
            x, y = micro[rank]
            engine.backward(F.mse_loss(engine(x).float(), y, reduction="sum"))
            engine.step(weight=y.numel())
    state, norm = engine.full_state_dict(), float(engine.get_global_grad_norm())
    engine.destroy()
    return state, norm


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=full)])
def test_losses_that_are_sums(ranks, world, stage, accumulation, clip):
    """`step(weight=n)` after sums of n terms equals one mean over all terms of all ranks and micro-steps."""
    setup = Setup(accumulation=accumulation, clip=clip)
    batches = counted(3, accumulation, world)
    twin = setup.twin(seeded(Mlp))
    for window in batches:
        x, y = (torch.cat([batch[k] for micro in window for batch in micro]) for k in range(2))
        twin.backward(F.mse_loss(twin(x), y))
        twin.step()
    for state, norm in ranks(by_count, world, batches, setup.config(stage)):
        assert_close(state, twin.state())
        assert norm == pytest.approx(twin.norm, rel=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sums_in_low_precision(ranks, dtype):
    setup = Setup(dtype, "SGD", accumulation=2, scale_power=4)
    batches = counted(3, 2, 2)
    twin = setup.twin(seeded(Mlp))
    before = twin.state()
    for window in batches:
        for micro in window:
            for x, y in micro:
                twin.backward(F.mse_loss(twin(x).float(), y, reduction="sum"), weight=1.0, count=y.numel())
        twin.step()
    for state, _ in ranks(by_count, 2, batches, setup.config(2)):
        assert_close(state, twin.state(), dtype, before)


# --- a last incomplete window -----------------------------------------------------------------------------------------


def five_of_six(batches, config):
    """Five micro-batches at accumulation 2; the last window holds one and is applied by hand."""
    rank = dist.get_rank()
    engine = start(Mlp, config)
    micros = [micro for window in batches for micro in window][:5]
    boundaries = []
    for k, micro in enumerate(micros):
        x, y = micro[rank]
        engine.backward(F.mse_loss(engine(x).float(), y))
        engine.step(boundary=True) if k == 4 else engine.step()
        boundaries.append(engine.global_steps)
    state = engine.full_state_dict()
    engine.destroy()
    return state, boundaries


@pytest.mark.parametrize("stage", STAGES)
def test_incomplete_window_that_the_caller_ends_is_a_sum(ranks, stage):
    setup = Setup(accumulation=2)
    batches = [[[regression(4, seed=10 * k + rank) for rank in range(2)]] for k in range(5)]
    twin = setup.twin(seeded(Mlp))
    for window in ((0, 1), (2, 3), (4,)):
        for k in window:
            for x, y in batches[k][0]:
                twin.backward(F.mse_loss(twin(x), y), count=setup.accumulation / len(window))
        twin.step()
    for state, steps in ranks(five_of_six, 2, batches, setup.config(stage)):
        assert steps == [0, 1, 1, 2, 3]
        assert_close(state, twin.state())
