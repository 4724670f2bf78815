"""Autograd and module hooks: what is saved, recomputed, differentiated on the way, and what is left behind."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import shardline
from shardline.sharding.parameter import is_sealed
from shardline.sharding.saved_tensors import SavedWeight
from shardline.sharding.unit import Residence
from tests.harness import Setup, assert_close, check_against_twin, seeded, start
from tests.in_place.loops import averaged, config
from tests.models import WIDTH, Block, Mlp, mse, regression

# --- what autograd saves ----------------------------------------------------------------------------------------------


def saved_by_a_forward(stage):
    """Storage that autograd holds between forward and backward, by what our hooks made of each saved tensor."""
    engine = start(Mlp, Setup().config(stage))
    saved, kinds = engine.trainables.hooks.saved, []
    original = saved.pack

    def pack(tensor):
        packed = original(tensor)
        shape = tuple(tensor.shape)
        kinds.append((isinstance(packed, SavedWeight), shape, packed.name if isinstance(packed, SavedWeight) else None))
        return packed

    saved.pack = pack
    loss = mse(engine, engine.module, regression(4))
    here = [name for name, p in engine.module.named_parameters() if is_sealed(p)]
    engine.backward(loss)
    engine.step()
    engine.destroy()
    return kinds, len(here)


def test_weights_are_saved_as_places(ranks) -> None:
    """At stage 3 no weight is kept by autograd: each saved (32, 32) tensor is a place in a unit, with its name."""
    for kinds, sealed in ranks(saved_by_a_forward, 2, 3):
        weights = [(is_place, name) for is_place, shape, name in kinds if shape == (WIDTH, WIDTH)]
        assert weights and all(is_place for is_place, _ in weights)
        # The very first layer needs no gradient of its input, so its weight is not saved.
        wanted = {name for name, p in Mlp().named_parameters() if p.dim() == 2} - {"blocks.0.up.weight"}
        assert {name for _, name in weights} == wanted
        assert not any(is_place for is_place, shape, _ in kinds if shape == (4, WIDTH)), "activations are kept"
        assert sealed == len(list(Mlp().parameters()))


@pytest.mark.parametrize("stage", [0, 2])
def test_whole_weights_need_no_packing(ranks, stage) -> None:
    for kinds, _ in ranks(saved_by_a_forward, 2, stage):
        assert kinds == []


def save_on_cpu_loss(call, module, batch):
    with torch.autograd.graph.save_on_cpu():
        return mse(call, module, batch)


def save_on_cpu_inside(call, module, batch):
    x = batch[0]
    with torch.autograd.graph.save_on_cpu():
        x = module.blocks[0](x)
    return F.mse_loss(module.head(x), batch[1])


@pytest.mark.parametrize("loss_of", [save_on_cpu_loss, save_on_cpu_inside], ids=["around", "around a part"])
def test_with_save_on_cpu(ranks, loss_of) -> None:
    check_against_twin(ranks, Mlp, loss_of, regression, stages=(3,), steps=2)


class PackedInside(Mlp):
    """Uses saved-tensor hooks of its own within its forward."""

    def forward(self, x):
        packed = []

        def pack(tensor):
            packed.append(tensor)
            return len(packed) - 1

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: packed[i].clone()):
            x = self.blocks[0](x)
        return self.head(self.blocks[1](x))


def test_a_model_with_saved_tensor_hooks_of_its_own(ranks) -> None:
    """They win inside their block, as the innermost hooks do; what they keep is right all the same."""
    check_against_twin(ranks, PackedInside, mse, regression, stages=(2, 3), steps=2)


def two_graphs(config, batches):
    """One forward under hooks of the user's, one without, then both backwards."""
    rank = dist.get_rank()
    engine = start(Mlp, config)
    first, second = batches[rank]
    seen = []

    def pack(tensor):
        seen.append("pack")
        return ("packed", tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[1]):
        one = mse(engine, engine.module, first)
    two = mse(engine, engine.module, second)
    try:
        engine.backward(one + two)
        engine.step()
        return engine.full_state_dict(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    finally:
        engine.destroy()


def test_each_graph_keeps_the_hooks_it_was_made_under(ranks) -> None:
    setup = Setup("fp32", "SGD")
    batches = [[regression(4, seed=2 * rank), regression(4, seed=2 * rank + 1)] for rank in range(2)]
    twin = setup.twin(seeded(Mlp))
    for first, second in batches:
        twin.backward(mse(twin, twin.model, first) + mse(twin, twin.model, second))
    twin.step()
    for state, error in ranks(two_graphs, 2, setup.config(3), batches):
        assert error is None
        assert_close(state, twin.state())


# --- checkpointing ----------------------------------------------------------------------------------------------------


class Mixed(Mlp):
    """Checkpointing of both kinds, one around two blocks, one inside the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.first(x)
        x = checkpoint(lambda y: self.blocks[1](checkpoint(self.blocks[0], y, use_reentrant=False)), x,
                       use_reentrant=False)  # fmt: skip
        return self.head(checkpoint(lambda y: self.blocks[3](self.blocks[2](y)), x, use_reentrant=True))


class InsideBlock(Block):
    """Checkpoints a part of itself, whose weights lie in the unit that is in use around it."""

    def forward(self, x):
        return x + checkpoint(lambda y: self.down(F.gelu(self.up(y))), x, use_reentrant=self.reentrant)


def inside(reentrant):
    model = Mlp()
    model.first = nn.Linear(WIDTH, WIDTH)
    model.blocks = nn.ModuleList(InsideBlock() for _ in range(3))
    for block in model.blocks:
        block.reentrant = reentrant
    return model


def inside_reentrant():
    return inside(True)


def inside_non_reentrant():
    return inside(False)


def from_first(call, module, batch):
    x, y = batch
    return F.mse_loss(call(x.clone().requires_grad_()).float(), y)


@pytest.mark.parametrize("build", [Mixed, inside_reentrant, inside_non_reentrant])
def test_checkpointing(ranks, build) -> None:
    """Several ways; both modes around whole blocks are in the specification."""
    check_against_twin(ranks, build, from_first, regression, stages=(1, 3), steps=2)


# --- differentiation inside a forward ---------------------------------------------------------------------------------


class Energy(nn.Module):
    """Forces are the gradient of an energy with respect to positions, taken inside the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            y = x
            for block in self.blocks:
                y = block(y)
            energy = self.head(torch.tanh(y)).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=self.training)
        return force


def test_autograd_grad_within_a_forward(ranks) -> None:
    check_against_twin(ranks, Energy, mse, regression, stages=(0, 3), steps=2)


def evaluate_energy(config):
    engine = start(Energy, config).eval()
    with torch.no_grad():
        force = engine(regression(4)[0])
    engine.train()
    resident = sum(unit.sharded and unit.residence is Residence.GATHERED for unit in engine.trainables.layout.units)
    engine.backward(mse(engine, engine.module, regression(4)))
    engine.step()
    engine.destroy()
    return force, resident


def test_forces_in_an_evaluation(ranks) -> None:
    model = seeded(Energy).eval()
    expected = model(regression(4)[0])
    for force, resident in ranks(evaluate_energy, 2, Setup().config(3)):
        torch.testing.assert_close(force, expected, rtol=1e-5, atol=1e-6)
        assert resident == 0


# --- what is left behind ----------------------------------------------------------------------------------------------


class Queries(nn.Module):
    """Hands a parameter of its own to a module, as DETR and Perceiver do with learned queries."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.head(self.blocks[1](x) * self.blocks[0](self.query))


def count_hooks(build, stage, repeat):
    engine = start(build, Setup("fp32", "SGD").config(stage))
    x, y = regression(4)
    x.requires_grad_(repeat)
    counts = []
    for _ in range(4):
        engine.backward(F.mse_loss(engine(x), y))
        engine.step()
        tensors = [x, *engine.module.parameters()]
        counts.append(sum(len(t._backward_hooks or ()) for t in tensors))
    state = engine.full_state_dict()
    engine.destroy()
    return counts, state


@pytest.mark.parametrize(("build", "repeat"), [(Mlp, False), (Queries, False), (Mlp, True)])
def test_steps_leave_no_hooks_on_leaves(ranks, build, repeat) -> None:
    """A parameter, or the user's own tensor, that goes into a module at every step."""
    for counts, _ in ranks(count_hooks, 2, build, 3, repeat):
        assert counts[-1] == counts[0]


def test_a_parameter_as_input_is_right(ranks) -> None:
    check_against_twin(ranks, Queries, mse, regression, stages=(0, 3))


def forgotten_graphs(config):
    """Outputs that are not differentiated are freed at once, without the garbage collector."""
    engine = start(Mlp, config)
    gc.collect()
    gc.disable()
    try:
        output = engine(regression(4)[0])
        alive = weakref.ref(output)
        del output
        freed = alive() is None
        block = engine.module.blocks[0]
        seen = []
        handle = block.register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
        engine.backward(mse(engine, engine.module, regression(4)))
        engine.step()
        handle.remove()
        freed = freed and all(ref() is None for ref in seen)
    finally:
        gc.enable()
    engine.destroy()
    return freed


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 1), (2, 3)])
def test_graphs_are_freed_by_reference_counts(ranks, world, stage) -> None:
    assert all(ranks(forgotten_graphs, world, Setup().config(stage)))


def kept_of_forwards(config):
    """Of forwards with gradients and without a backward: the outputs that operations saved, and a second derivative."""
    layers = [
        nn.Linear(WIDTH, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, WIDTH),
        nn.Softmax(-1),
        nn.Linear(WIDTH, 1),
        nn.ReLU(),
    ]
    engine = start(lambda: nn.Sequential(*layers), config)
    gc.disable()
    try:
        seen = []
        for module in engine.module:
            module.register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
        for _ in range(2):
            engine(torch.randn(4, WIDTH))
        alive = [ref() is not None for ref in seen]
    finally:
        gc.enable()
    x = torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH).requires_grad_()
    (slope,) = torch.autograd.grad(engine(x).sum(), x, create_graph=True)
    engine.backward(slope.square().sum())
    engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return alive, slope.detach(), state


def test_a_forward_without_a_backward_keeps_nothing(ranks) -> None:
    """Some operations save their output: such as it is, it would hold the operation that holds it."""
    whole = ranks(kept_of_forwards, 1, Setup(optimizer="SGD").config(0))[0]
    for alive, slope, state in ranks(kept_of_forwards, 2, Setup(optimizer="SGD").config(3)):
        assert not any(alive)
        assert_close({"slope": slope, **state}, {"slope": whole[1], **whole[2]})


def interrupt(config):
    """Somebody presses Ctrl-C in the second block."""
    engine = start(Mlp, config)
    before = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def press(module, args):
        raise KeyboardInterrupt

    handle = engine.module.blocks[1].down.register_forward_pre_hook(press)
    with contextlib.suppress(KeyboardInterrupt):
        engine(regression(4)[0])
    handle.remove()
    holds = [unit.holds for unit in engine.trainables.layout.units]
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    try:
        engine.backward(mse(engine, engine.module, regression(4)))
        engine.step()
        said = None
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    if hooks != before:
        torch._C._autograd._pop_saved_tensors_default_hooks()
    for unit in engine.trainables.layout.units:
        unit.holds = 0
    engine.destroy()
    return said, any(holds), hooks != before


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 3)])
def test_training_goes_on_after_ctrl_c_in_a_forward(ranks, world, stage) -> None:
    """In a notebook a cell is interrupted and run again."""
    for said, held, pushed in ranks(interrupt, world, Setup().config(stage)):
        assert said is None and not held and not pushed


def count_module_hooks(config):
    model = seeded(Mlp)
    handle = model.blocks[0].register_forward_hook(lambda module, args, out: None)
    import shardline

    engine = shardline.initialize(model=model, config=config)[0]
    during = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    engine.trainables.hooks.remove()
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    engine.destroy()
    handle.remove()
    return during, after


def test_removal_takes_ours_and_leaves_the_users(ranks) -> None:
    for during, after in ranks(count_module_hooks, 2, Setup().config(3)):
        assert during > 1 and sum(after) == 1


def user_hooks(config):
    """The user's hooks run inside ours: weights are whole in all of them."""
    import shardline

    model, seen = seeded(Mlp), []

    def look(name):
        def hook(module, *args):
            seen.append((name, float(module.up.weight.detach().double().sum())))

        return hook

    model.blocks[1].register_forward_pre_hook(look("early pre"))
    model.blocks[1].register_forward_hook(look("early post"))
    engine = shardline.initialize(model=model, config=config)[0]
    model.blocks[1].register_forward_pre_hook(look("late pre"))
    engine.backward(mse(engine, engine.module, regression(4)))
    engine.destroy()
    return seen


def test_hooks_of_the_user_see_whole_weights(ranks) -> None:
    expected = float(seeded(Mlp).blocks[1].up.weight.detach().double().sum())
    for seen in ranks(user_hooks, 2, Setup().config(3)):
        assert [name for name, _ in seen] == ["early pre", "late pre", "early post"]
        assert all(value == expected for _, value in seen)


# --- plain backward ---------------------------------------------------------------------------------------------------


class FirstUnused(nn.Module):
    """Its first parameters take no part in this forward, as a vision tower in a step of text."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x))


class Penalised(Mlp):
    """Keeps a loss made of its own weights on `self`, beside its output."""

    def forward(self, x):
        self.penalty = self.head.weight.square().sum()
        return super().forward(x)


def penalised_loss(call, module, batch):
    out = call(batch[0])
    return F.mse_loss(out.float(), batch[1]) + 0.1 * module.penalty.float()


def by_plain_backward(build, loss_of, config, batch):
    engine = start(build, config)
    loss_of(engine, engine.module, batch).backward()
    engine.step()
    result = engine.full_state_dict(), float(engine.get_global_grad_norm())
    engine.destroy()
    return result


CASES = {
    "first parameters unused": (FirstUnused, mse),
    "a loss beside the output": (Penalised, penalised_loss),
}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_plain_backward_means_the_same(ranks, case, dtype, world) -> None:
    build, loss_of = CASES[case]
    setup = Setup(dtype, "SGD", scale_power=12)
    batch = regression(4)
    twin = setup.twin(seeded(build))
    before = twin.state()
    for _ in range(world):
        twin.backward(loss_of(twin, twin.model, batch))
    twin.step()
    for state, norm in ranks(by_plain_backward, world, build, loss_of, setup.config(3), batch):
        assert norm == pytest.approx(twin.norm, rel=1e-2)
        assert_close(state, twin.state(), dtype, before)


# --- attributes of saved parameters -----------------------------------------------------------------------------------


class Quantized(nn.Parameter):
    """A frozen weight with a scale beside it, as quantized ones have."""


class Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ (weight * weight.scale)

    @staticmethod
    def backward(ctx, grad):
        _, weight = ctx.saved_tensors
        assert isinstance(weight, Quantized)
        return grad @ (weight * weight.scale).t(), None


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = Quantized(torch.randn(8, 8), requires_grad=False)
        self.weight.scale = 0.5
        self.adapter = nn.Linear(8, 8)

    def forward(self, x):
        return self.adapter(x) + Dequantize.apply(x, self.weight)


def attributes_of_saved(stages):
    results = []
    for stage in (None, *stages):
        torch.manual_seed(0)
        model = nn.Sequential(*(Base() for _ in range(3)))
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
        if stage is None:
            averaged(model, torch.optim.SGD(model.parameters()))
            model(x).square().mean().backward()
            results.append([module.adapter.weight.grad for module in model])
            continue
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        engine = shardline.shard(model, optimizer, config(stage))
        for _ in range(2):
            model(x).square().mean().backward()
            results.append([engine.parameter(f"{i}.adapter.weight").full_grad() for i in range(3)])
            optimizer.zero_grad()
        engine.destroy()
        assert model[0].weight.scale == 0.5 and type(model[0].weight) is Quantized
    return results


@pytest.mark.parametrize("world", [1, 2])
def test_a_saved_frozen_parameter_keeps_its_class_and_attributes(ranks, world):
    for want, *found in ranks(attributes_of_saved, world, (0, 3)):
        for got in found:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
