"""The ways in: `full_state_dict`, `gathered_parameters`, `before_step` and `after_step`."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.harness import STAGES, Setup, assert_close, assert_identical, is_whole, seeded, spread, start, train_twin
from tests.models import ConvNet, Lora, Mlp, TinyGpt, cross_entropy, images, mse, regression

# --- full_state_dict --------------------------------------------------------------------------------------------------


def full_state(build, config, kwargs):
    engine = start(build, config)
    state = engine.full_state_dict(**kwargs)
    kept = {name: value.clone() for name, value in state.items()} if state else state
    alone = [
        value.untyped_storage().nbytes() == value.numel() * value.element_size() for value in (state or {}).values()
    ]
    with engine.gathered_parameters(write=True), torch.no_grad():
        for p in engine.module.parameters():
            p.add_(1.0)
    own = all(torch.equal(state[name], kept[name]) for name in state) if state else True
    names = list(engine.module.state_dict()) if engine.zero_optimization_stage() < 3 else None
    engine.destroy()
    return kept, own, all(alone), names


@pytest.mark.parametrize("build", [Mlp, TinyGpt, ConvNet], ids=["mlp", "tied gpt", "convolutions with statistics"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_full_state_dict(ranks, stage, dtype, build):
    """Names, order, shapes and bits of the model as it was given, in fp32, in tensors of their own."""
    expected = seeded(build).state_dict()
    for state, own, _, names in ranks(full_state, 2, build, Setup(dtype).config(stage), {}):
        assert_identical(state, expected)
        assert own, "a later change of the model reached the state dict"
        assert names is None or names == list(expected)


@pytest.mark.parametrize("stage", STAGES)
def test_on_rank_0_only_and_in_another_dtype(ranks, stage):
    kwargs = {"dtype": torch.bfloat16, "rank0_only": True}
    first, second = ranks(full_state, 2, Mlp, Setup().config(stage), kwargs)
    assert_identical(first[0], {name: p.bfloat16() for name, p in seeded(Mlp).state_dict().items()})
    assert not second[0]


@pytest.mark.parametrize("stage", STAGES)
def test_integers_are_not_cast(ranks, stage):
    state, *_ = ranks(full_state, 2, ConvNet, Setup().config(stage), {"dtype": torch.float16})[0]
    assert state["norm1.num_batches_tracked"].dtype == torch.int64
    assert state["conv1.weight"].dtype == torch.float16


def narrow_lora():
    return Lora(64)


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_weights_are_in_it(ranks, stage):
    state, *_ = ranks(full_state, 2, narrow_lora, Setup("bf16").config(stage), {})[0]
    expected = seeded(narrow_lora).state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        known = value.bfloat16() if "base" in name else value  # what is frozen has no master
        torch.testing.assert_close(state[name].float(), known.float(), rtol=0, atol=0)


# --- gathered_parameters ----------------------------------------------------------------------------------------------


def read_gathered(config):
    """Reads of everything, of one parameter, nested, twice, and that they are away again afterwards."""
    engine = start(Mlp, config)
    model = engine.module
    with engine.gathered_parameters():
        everything = {name: p.detach().clone() for name, p in model.named_parameters()}
        with engine.gathered_parameters([model.head.weight]):
            inner = model.head.weight.detach().clone()
        still = model.head.weight.detach().clone()
        plain = {name: value.clone() for name, value in model.state_dict().items()}
    away = not any(is_whole(p) for p in model.parameters())
    with engine.gathered_parameters([model.blocks[1].up.bias]):
        one = model.blocks[1].up.bias.detach().clone()
    with engine.gathered_parameters(model.head.parameters()):
        head = model.head.bias.detach().clone()
    try:
        with engine.gathered_parameters():
            raise KeyError("as asked")
    except KeyError:
        pass
    away_after_error = not any(is_whole(p) for p in model.parameters())
    engine.destroy()
    return everything, plain, inner, still, one, head, away, away_after_error


@pytest.mark.parametrize(("world", "stage"), [(2, 0), (2, 2), (2, 3), (3, 3), (1, 3)])
def test_read(ranks, world, stage):
    expected = seeded(Mlp).state_dict()
    for everything, plain, inner, still, one, head, away, later in ranks(read_gathered, world, Setup().config(stage)):
        assert_identical(everything, expected)
        assert_identical(plain, expected)
        assert torch.equal(inner, expected["head.weight"]) and torch.equal(still, inner)
        assert torch.equal(one, expected["blocks.1.up.bias"]) and torch.equal(head, expected["head.bias"])
        assert away == later == (stage == 3 and world > 1)


def write_gathered(batches, config):
    rank = dist.get_rank()
    engine = start(Mlp, config)
    model = engine.module
    for step, window in enumerate(batches):
        if step == 1:
            with engine.gathered_parameters(write=True), torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.5)
        if step == 2:
            with engine.gathered_parameters([model.head.weight], write=True), torch.no_grad():
                model.head.weight.copy_(torch.eye(32))
        engine.backward(mse(engine, model, window[0][rank]))
        engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return state


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_write(ranks, stage, dtype):
    setup = Setup(dtype, "SGD")
    batches = spread(regression, 4, setup, 2)
    twin = setup.twin(seeded(Mlp))
    before = twin.state()
    for step, window in enumerate(batches):
        if step == 1:
            for name, p in twin.params.items():
                # what a user halves is the weight that they see
                twin.master(name).copy_(p.detach().float() * 0.5)
        if step == 2:
            twin.master("head.weight").copy_(torch.eye(32))
        twin.publish()
        for batch in window[0]:
            twin.backward(mse(twin, twin.model, batch))
        twin.step()
    for state in ranks(write_gathered, 2, batches, setup.config(stage)):
        assert_close(state, twin.state(), dtype, before)


def write_alone(config):
    """Rank 1 writes something else; "everywhere alike" is what the next reader must see."""
    import shardline

    engine = start(Mlp, config)
    try:
        with engine.gathered_parameters(write=True), torch.no_grad():
            engine.module.head.weight.fill_(float(dist.get_rank()))
        with engine.gathered_parameters():
            seen = engine.module.head.weight.detach().clone()
        state = engine.full_state_dict()["head.weight"]
    except shardline.errors.ShardlineError as error:
        engine.destroy()
        return str(error), None, None
    engine.destroy()
    return None, seen, state


@pytest.mark.parametrize("stage", [0, 3])
def test_writes_that_differ_by_rank_end_alike(ranks, stage):
    (error, seen, state), (other_error, other_seen, other_state) = ranks(write_alone, 2, Setup().config(stage))
    if error is not None:
        assert other_error is not None and "head.weight" in error
        return
    assert torch.equal(seen, other_seen) and torch.equal(state, other_state) and torch.equal(seen, state)


# --- before_step and after_step ---------------------------------------------------------------------------------------


def read_fragments(batches, config):
    """What a hook sees at each step: (name, start, stop, weight, grad, {key: value})."""
    rank = dist.get_rank()
    engine = start(Mlp, config)
    seen = {"before": [], "after": []}

    def record(moment):
        def fn(fragments):
            seen[moment].append(
                [
                    (
                        f.name,
                        f.start,
                        f.stop,
                        f.weight.detach().clone(),
                        None if f.grad is None or moment == "after" else f.grad.clone(),
                        {key: value.clone() for key, value in f.state.items() if torch.is_tensor(value)},
                    )
                    for f in fragments
                ]
            )

        return fn

    handles = [engine.before_step(record("before")), engine.after_step(record("after"))]
    for step, window in enumerate(batches):
        if step == len(batches) - 1:
            for handle in handles:
                handle.remove()
        for micro in window:
            engine.backward(mse(engine, engine.module, micro[rank]))
            engine.step()
    engine.destroy()
    return seen


def assemble(pieces_of_ranks, which, shapes):
    """Whole tensors by name from the fragments of all ranks; each element from somewhere, equal where twice."""
    whole = {name: torch.full(shape, float("nan")).flatten() for name, shape in shapes.items()}
    for pieces in pieces_of_ranks:
        for piece in pieces:
            name, start, stop, value = piece[0], piece[1], piece[2], which(piece)
            assert value.shape == (stop - start,)
            known = whole[name][start:stop]
            assert torch.all(known.isnan() | (known == value)), f"{name}: fragments of two ranks differ"
            known.copy_(value)
    assert not any(value.isnan().any() for value in whole.values())
    return {name: value.view(shapes[name]) for name, value in whole.items()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_what_hooks_see(ranks, stage, dtype):
    """Masters; averaged, unscaled, unclipped gradients; Adam's moments; by name and range, each element somewhere."""
    setup = Setup(dtype, "AdamW", clip=0.05, accumulation=2)
    batches = spread(regression, 4, setup, 2)
    twin = setup.twin(seeded(Mlp))
    shapes = {name: p.shape for name, p in twin.params.items()}
    start_state = twin.state()
    results = ranks(read_fragments, 2, batches, setup.config(stage))
    assert all(len(seen["before"]) == len(seen["after"]) == 3 for seen in results), "a removed hook was called"
    for step, window in enumerate(batches[:3]):
        for micro in window:
            for batch in micro:
                twin.backward(mse(twin, twin.model, batch))
        grads = {name: (g / twin.average)[: shapes[name].numel()].view(shapes[name]) for name, g in twin.sums.items()}
        before = [seen["before"][step] for seen in results]
        weights = {name: twin.master(name).clone() for name in shapes}
        assert_close(assemble(before, lambda piece: piece[3], shapes), weights, dtype, start_state)
        assert_close(assemble(before, lambda piece: piece[4], shapes), grads, dtype, times=10)
        assert twin.step() and twin.norm > 0.05
        after = [seen["after"][step] for seen in results]
        weights = {name: twin.master(name).clone() for name in shapes}
        assert_close(assemble(after, lambda piece: piece[3], shapes), weights, dtype, start_state)
        moments = {
            name: twin.optimizer.state[m]["exp_avg"][: shapes[name].numel()].view(shapes[name])
            for name, m in twin.masters.items()
        }
        assert_close(assemble(after, lambda piece: piece[5]["exp_avg"], shapes), moments, dtype, times=10)


def clip_values(batches, config):
    """Clip by value before, keep an average after, zero the head's gradients: each through the fragments alone."""
    rank = dist.get_rank()
    engine = start(Mlp, config)
    average = {}

    def before(fragments):
        for f in fragments:
            f.grad.clamp_(-1e-3, 1e-3)
            if f.name == "head.bias":
                f.grad.zero_()

    def after(fragments):
        for f in fragments:
            kept = average.setdefault((f.name, f.start, f.stop), torch.zeros_like(f.weight))
            kept.lerp_(f.weight, 0.5)
            if f.name == "head.weight":
                f.weight.clamp_(-0.1, 0.1)

    engine.before_step(before)
    engine.after_step(after)
    for window in batches:
        for micro in window:
            engine.backward(mse(engine, engine.module, micro[rank]))
            engine.step()
    with engine.gathered_parameters():
        shown = engine.module.head.weight.detach().float().clone()
    state = engine.full_state_dict()
    engine.destroy()
    return [(name, start, stop, value) for (name, start, stop), value in average.items()], state, shown


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_what_hooks_change(ranks, stage, dtype):
    """Clipping by value replaces the gradient that the norm is taken of; a weight changed after the step is shown."""
    setup = Setup(dtype, "SGD", accumulation=2)
    batches = spread(regression, 3, setup, 2)
    twin = setup.twin(seeded(Mlp))
    start_state, average = twin.state(), {name: torch.zeros(p.shape) for name, p in twin.params.items()}
    for window in batches:
        for micro in window:
            for batch in micro:
                twin.backward(mse(twin, twin.model, batch))
        for name, g in twin.sums.items():
            g.copy_((g / twin.average).clamp(-1e-3, 1e-3) * twin.average * (name != "head.bias"))
        twin.step()
        for name, kept in average.items():
            kept.lerp_(twin.master(name), 0.5)
        twin.master("head.weight").clamp_(-0.1, 0.1)
        twin.publish()
    results = ranks(clip_values, 2, batches, setup.config(stage))
    shapes = {name: value.shape for name, value in average.items()}
    pieces = [[(*piece, None, None) for piece in pieces] for pieces, _, _ in results]
    assert_close(
        assemble(pieces, lambda piece: piece[3], shapes), average, dtype, dict.fromkeys(average, torch.zeros(()))
    )
    for _, state, shown in results:
        assert_close(state, twin.state(), dtype, start_state)
        torch.testing.assert_close(shown, twin.params["head.weight"].detach().float(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_a_hook_that_clips_hides_no_overflow(ranks, stage):
    """Clamped to finite values, infinities would be stepped on."""
    setup = Setup("fp16", "SGD", scale_power=22)
    batches = spread(regression, 8, setup, 2)
    twin, expected = train_twin(Mlp, mse, batches, setup)
    assert 0 < twin.skipped < 8
    for skipped, state in ranks(clip_overflow, 2, batches, setup.config(stage)):
        assert skipped == twin.skipped
        assert_close(state, expected["state"], "fp16", setup.twin(seeded(Mlp)).state())


def clip_overflow(batches, config):
    rank = dist.get_rank()
    engine = start(Mlp, config)

    def clip(fragments):
        for f in fragments:
            f.grad.nan_to_num_().clamp_(-10, 10)  # gradients are far smaller

    engine.before_step(clip)
    for window in batches:
        engine.backward(mse(engine, engine.module, window[0][rank]))
        engine.step()
    result = engine.skipped_steps, engine.full_state_dict()
    engine.destroy()
    return result


@pytest.mark.parametrize("stage", STAGES)
def test_reading_leaves_no_trace(ranks, stage):
    """Not in the middle of a micro-step either."""
    setup = Setup("bf16", "SGD")
    batches = spread(images, 3, setup, 2)
    _, expected = train_twin(ConvNet, cross_entropy, batches, setup)
    before = setup.twin(seeded(ConvNet)).state()
    for state in ranks(read_every_step, 2, batches, setup.config(stage)):
        assert_close(state, expected["state"], "bf16", before)


def read_every_step(batches, config):
    rank = dist.get_rank()
    engine = start(ConvNet, config)
    for window in batches:
        loss = cross_entropy(engine, engine.module, window[0][rank])
        engine.full_state_dict()
        engine.backward(loss)
        engine.full_state_dict(rank0_only=True)
        with engine.gathered_parameters():
            pass
        engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return state
