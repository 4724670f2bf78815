"""Optimizers: a user's own is taken over in place; one that is not elementwise is right or refused, never wrong."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.harness import STAGES, Setup, assert_close, assert_identical, seeded, spread
from tests.models import Mlp, TinyGpt, cross_entropy, mse, regression, tokens


def plain_loop(batches, optimizer, after=lambda step: None):
    """The expectation for optimizers that need shapes: one fp32 model, one mean over all ranks' micro-batches."""
    model = seeded(Mlp)
    stepper = optimizer(model)
    for step, window in enumerate(batches):
        stepper.zero_grad()
        losses = [mse(model, model, batch) for micro in window for batch in micro]
        (torch.stack(losses).mean()).backward()
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        stepper.step()
        after(step)
    return model.state_dict()


def grouped(model):
    """Two groups: biases neither decay nor step as far."""
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    weights = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    return [{"params": weights, "weight_decay": 0.1, "lr": 0.05}, {"params": biases, "lr": 0.01}]


def sgd_in_groups(model):
    return torch.optim.SGD(grouped(model), lr=0.5, momentum=0.9)


def adamw_in_groups(model):
    return torch.optim.AdamW(grouped(model), lr=0.5, eps=1e-3)


def train_own(how, build_optimizer, batches, config):
    """`how` the optimizer is given; a schedule that the user attached to it and steps by hand."""
    import shardline

    rank = dist.get_rank()
    model = seeded(Mlp)
    if how == "instance":
        own = build_optimizer(model)
        schedule = torch.optim.lr_scheduler.StepLR(own, 1, 0.5)
        engine, optimizer, _, _ = shardline.initialize(model=model, optimizer=own, config=config)
        groups_kept = optimizer.param_groups is own.param_groups
    elif how == "callable":
        engine, optimizer, _, _ = shardline.initialize(
            model=model, optimizer=lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9),
            model_parameters=grouped(model), config=config,
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        groups_kept = len(optimizer.param_groups) == 2
    else:  # by name in the config, with the user's groups
        engine, optimizer, _, _ = shardline.initialize(model=model, model_parameters=grouped(model), config=config)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        groups_kept = len(optimizer.param_groups) == 2
    rates = []
    for window in batches:
        for micro in window:
            engine.backward(mse(engine, engine.module, micro[rank]))
            engine.step()
        schedule.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    state = engine.full_state_dict()
    engine.destroy()
    return state, rates, groups_kept


@pytest.mark.parametrize("how", ["instance", "callable", "name"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 2])
def test_own_optimizer_with_groups_and_schedule(ranks, world, stage, how):
    setup = Setup(accumulation=2)
    batches = spread(regression, 3, setup, world)
    schedules = []

    def build(model):
        optimizer = sgd_in_groups(model)
        schedules.append(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
        return optimizer

    expected = plain_loop(batches, build, after=lambda step: schedules[0].step())
    config = setup.config(stage)
    config["optimizer"] = {"type": "SGD", "params": {"lr": 0.5, "momentum": 0.9}}
    if how != "name":
        del config["optimizer"]
    for state, rates, kept in ranks(train_own, world, how, sgd_in_groups, batches, config):
        assert_close(state, expected)
        assert rates == [[0.025, 0.005], [0.0125, 0.0025], [0.00625, 0.00125]]
        assert kept


@pytest.mark.parametrize("stage", STAGES)
def test_own_adamw(ranks, stage):
    setup = Setup()
    batches = spread(regression, 3, setup, 2)
    schedules = []

    def build(model):
        optimizer = adamw_in_groups(model)
        schedules.append(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
        return optimizer

    expected = plain_loop(batches, build, after=lambda step: schedules[0].step())
    config = {k: v for k, v in setup.config(stage).items() if k != "optimizer"}
    for state, _, _ in ranks(train_own, 2, "instance", adamw_in_groups, batches, config):
        assert_close(state, expected)


# --- not elementwise --------------------------------------------------------------------------------------------------


class PerParameter(torch.optim.Optimizer):
    """Unknown to any list: each parameter's gradient is normalised by its own norm."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * p.grad / (p.grad.norm() + 1e-3)


class Global(PerParameter):
    """All gradients are normalised by the norm of all."""

    @torch.no_grad()
    def step(self, closure=None):
        every = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not every:
            return
        norm = torch.cat([p.grad.flatten() for p in every]).norm() + 1e-3
        for p in every:
            p -= self.param_groups[0]["lr"] * p.grad / norm


class ByShape(PerParameter):
    """Centralised gradients: rows have zero mean, for matrices only."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    g = p.grad - p.grad.mean(1, keepdim=True) if p.dim() > 1 else p.grad
                    p -= group["lr"] * g


class Elementwise(PerParameter):
    """Unknown, but fine."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    m.mul_(0.9).add_(p.grad)
                    p -= group["lr"] * m.tanh()


def _every(kind, **kwargs):
    return lambda model: kind(model.parameters(), **kwargs)


def _matrices(kind, **kwargs):
    return lambda model: kind([p for p in model.parameters() if p.dim() == 2], **kwargs)


KINDS = {
    "PerParameter": _every(PerParameter),
    "Global": _every(Global),
    "ByShape": _every(ByShape),
    "Adafactor": _every(torch.optim.Adafactor, lr=1e-2),
    "Muon": _matrices(getattr(torch.optim, "Muon", torch.optim.SGD), lr=1e-2),
    "Elementwise": _every(Elementwise),
    "Rprop": _every(torch.optim.Rprop, lr=1e-3),
    "ASGD": _every(torch.optim.ASGD, lr=1e-2),
    "Adamax": _every(torch.optim.Adamax, lr=1e-2, eps=1e-3),
    "RAdam": _every(torch.optim.RAdam, lr=1e-2, eps=1e-3),
}

ELEMENTWISE = {"Elementwise", "Adamax", "RAdam"}


def train_kind(kind, batches, config):
    import shardline

    rank = dist.get_rank()
    model = seeded(Mlp)
    try:
        engine, *_ = shardline.initialize(model=model, optimizer=KINDS[kind](model), config=config)
    except shardline.errors.OptimizerError as error:
        return str(error), None
    for window in batches:
        engine.backward(mse(engine, engine.module, window[0][rank]))
        engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return None, state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world", "stage"), [(2, 0), (2, 1), (2, 3), (1, 2)])
def test_right_or_refused(ranks, kind, world, stage):
    setup = Setup()
    config = {k: v for k, v in setup.config(stage).items() if k != "optimizer"}
    batches = spread(regression, 3, setup, world)
    expected = plain_loop(batches, KINDS[kind])
    for error, state in ranks(train_kind, world, kind, batches, config):
        if error is not None:
            assert stage > 0 and kind not in ELEMENTWISE, error
            assert kind in error
        else:  # Muon iterates in bf16
            assert_close(state, expected, times=1000 if kind == "Muon" else 1)


def name_lbfgs(config):
    import shardline

    try:
        shardline.initialize(model=seeded(Mlp), config=config)
    except shardline.errors.ShardlineError as error:
        return type(error).__name__, str(error)
    return None


@pytest.mark.parametrize("stage", [0, 2])
def test_one_that_needs_a_closure_is_refused(ranks, stage):
    config = Setup().config(stage) | {"optimizer": {"type": "LBFGS", "params": {"lr": 0.1}}}
    for name, error in ranks(name_lbfgs, 2, config):
        assert name == "OptimizerError" and "LBFGS" in error


class NaiveLamb(torch.optim.Optimizer):
    """LAMB by arXiv:1904.00962, algorithm 2, with DeepSpeed's bounds of the trust ratio (reference 3.1)."""

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                s = self.state[p]
                s["step"] = s.get("step", 0) + 1
                m = s.setdefault("m", torch.zeros_like(p)).mul_(b1).add_(p.grad, alpha=1 - b1)
                v = s.setdefault("v", torch.zeros_like(p)).mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                update = (m / (1 - b1 ** s["step"])) / ((v / (1 - b2 ** s["step"])).sqrt() + group["eps"])
                update += group["weight_decay"] * p
                ratio = (p.norm() / update.norm()).clamp(0.01, 10.0) if p.norm() > 0 and update.norm() > 0 else 1.0
                p -= group["lr"] * ratio * update


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 0), (2, 2), (2, 3)])
def test_lamb_by_name(ranks, world, stage):
    params = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}
    setup = Setup(more={"optimizer": {"type": "Lamb", "params": params}})
    batches = spread(regression, 3, setup, world)
    expected = plain_loop(batches, lambda model: NaiveLamb(model.parameters(), **params))
    for name, result in ranks(train_lamb, world, batches, setup.config(stage)):
        if name is None:
            assert_close(result, expected)
        else:
            assert name == "OptimizerError" and stage > 0


def train_lamb(batches, config):
    import shardline

    rank = dist.get_rank()
    try:
        engine, *_ = shardline.initialize(model=seeded(Mlp), config=config)
    except shardline.errors.OptimizerError as error:
        return "OptimizerError", str(error)
    for window in batches:
        engine.backward(mse(engine, engine.module, window[0][rank]))
        engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return None, state


# --- two optimizers in one --------------------------------------------------------------------------------------------


def muon_config(stage):
    params = {"muon_lr": 0.05, "adam_lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9, "betas": [0.9, 0.99], "eps": 1e-4}
    return Setup().config(stage) | {"optimizer": {"type": "Muon", "params": params}}


def muon_and_adamw(model):
    """The usual split by hand, with torch's own two."""
    hidden = [p for p in model.blocks.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if not any(p is h for h in hidden)]
    muon = torch.optim.Muon(hidden, lr=0.05, weight_decay=0.1, momentum=0.9)
    return muon, torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-4, fused=True)


def train_muon(steps, folder):
    """At every stage: `steps` steps without a stop; and again with one, resumed at the next stage."""
    import shardline

    rank = dist.get_rank()
    straight, resumed = [], []
    for stage in STAGES:
        for stop in (None, 1):
            engine, optimizer, *_ = shardline.initialize(model=seeded(TinyGpt), config=muon_config(stage))
            for number, batches in enumerate(steps):
                if number == stop:
                    engine.save_checkpoint(f"{folder}/{stage}")
                    engine.destroy()
                    other = muon_config((stage + 1) % len(STAGES))
                    engine, optimizer, *_ = shardline.initialize(model=seeded(TinyGpt), config=other)
                    engine.load_checkpoint(f"{folder}/{stage}")
                engine.backward(cross_entropy(engine, engine.module, batches[rank]))
                engine.step()
            assert [group["lr"] for group in optimizer.param_groups] == [0.05, 1e-2]
            (straight if stop is None else resumed).append(engine.full_state_dict())
            engine.destroy()
    return straight, resumed


def go_on_with_muon(steps, folder, stage):
    import shardline

    engine, *_ = shardline.initialize(model=seeded(TinyGpt), config=muon_config(0))
    engine.load_checkpoint(f"{folder}/{stage}")
    for batches in steps[1:]:
        engine.backward(cross_entropy(engine, engine.module, batches[0]))
        engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return state


def test_muon_by_name(ranks, tmp_path):
    """A model with an embedding, norms, biases and a head. Both ranks get the same data, so that means are exact."""
    steps = [[tokens(4, seed=seed)] * 2 for seed in range(3)]
    model = seeded(TinyGpt)
    optimizers = muon_and_adamw(model)
    for batches in steps:
        model.zero_grad()
        cross_entropy(model, model, batches[0]).backward()
        for optimizer in optimizers:
            optimizer.step()
    for straight, resumed in ranks(train_muon, 2, steps, str(tmp_path)):
        for state in straight + resumed:
            assert_identical(state, model.state_dict())
    for stage in (0, 3):
        assert_identical(ranks(go_on_with_muon, 1, steps, str(tmp_path), stage)[0], model.state_dict())


def test_muon_at_every_stage_alike(ranks, tmp_path):
    steps = [[tokens(4, seed=2 * seed), tokens(4, seed=2 * seed + 1)] for seed in range(3)]
    for straight, resumed in ranks(train_muon, 2, steps, str(tmp_path)):
        for state in straight + resumed:
            assert_identical(state, straight[0])


def change_what_muon_trains(steps, folder):
    """A matrix is frozen for a step. Then one matrix and the head change sides, and the job is resumed."""
    import shardline

    rank = dist.get_rank()

    def train(engine, which):
        for batches in steps[which]:
            engine.backward(cross_entropy(engine, engine.module, batches[rank]))
            engine.step()

    engine, *_ = shardline.initialize(model=seeded(lambda: TinyGpt(tied=False)), config=muon_config(3))
    frozen = engine.module.blocks[0].up.weight
    train(engine, slice(0, 1))
    frozen.requires_grad_(False)
    train(engine, slice(1, 2))
    frozen.requires_grad_(True)
    train(engine, slice(2, 3))
    state = engine.full_state_dict()
    engine.save_checkpoint(folder)
    engine.destroy()

    model = seeded(lambda: TinyGpt(tied=False))
    model.blocks[1].up.weight.use_muon, model.head.weight.use_muon = False, True
    engine, *_ = shardline.initialize(model=model, config=muon_config(2))
    engine.load_checkpoint(folder)
    engine.backward(cross_entropy(engine, engine.module, steps[0][rank]))
    engine.step()
    kept = {
        piece.name: sorted(piece.state)
        for piece in shardline.sharding.fragments.local_fragments(engine.trainables.layout.runs, engine.optimizer)
    }
    engine.destroy()
    return state, kept


def test_muon_after_a_change_of_what_it_trains(ranks, tmp_path):
    steps = [[tokens(4, seed=seed)] * 2 for seed in range(3)]
    model = seeded(lambda: TinyGpt(tied=False))
    optimizers = muon_and_adamw(model)
    for number, batches in enumerate(steps):
        model.zero_grad()
        model.blocks[0].up.weight.requires_grad_(number != 1)
        cross_entropy(model, model, batches[0]).backward()
        for optimizer in optimizers:
            optimizer.step()
    kept = {}
    for state, part in ranks(change_what_muon_trains, 2, steps, str(tmp_path)):
        assert_identical(state, model.state_dict())
        kept.update(part)
    for name, param in model.named_parameters():
        hidden = name.startswith("blocks.") and param.dim() == 2 and name != "blocks.1.up.weight"
        expected = ["momentum_buffer"] if hidden or name == "head.weight" else ["exp_avg", "exp_avg_sq", "step"]
        assert kept[name] == expected, name
