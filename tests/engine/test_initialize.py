"""`initialize`: the ways in which its arguments can be given, the four things it returns, and what it refuses."""

from __future__ import annotations

import functools
import json
import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, LinearLR, ReduceLROnPlateau, StepLR

import shardline
from shardline.config import load_config
from shardline.engine.initialize import _one_config, _optimizer_and_groups, _refuse_offload_param
from shardline.events import Notice
from shardline.observe.sinks import Sinks
from tests.harness import seeded
from tests.models import Mlp, mse, regression

SGD = {"type": "SGD", "params": {"lr": 0.5}}


def config_of(**keys):
    return {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1, "unit_min_numel": 1}} | keys


def train_a_step(engine):
    engine.backward(mse(engine, engine.module, regression(4)))
    engine.step()


def refused(**kwargs):
    """What `initialize` says."""
    try:
        shardline.initialize(**kwargs)[0].destroy()
    except shardline.ShardlineError as error:
        return type(error).__name__, error.message
    return None


# --- configuration ----------------------------------------------------------------------------------------------------


def without_a_batch_size():
    config = {key: value for key, value in config_of().items() if key != "train_micro_batch_size_per_gpu"}
    model = seeded(Mlp)
    engine, *_ = shardline.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config=config | {"gradient_accumulation_steps": 2},
    )
    train_a_step(engine)
    train_a_step(engine)
    sizes = engine.train_batch_size(), engine.global_steps, engine.global_samples
    engine.destroy()
    said = refused(model=seeded(Mlp), training_data=[1, 2], config=config | {"optimizer": SGD})
    return sizes, said


def test_a_batch_size_is_needed_for_the_engines_loader_only(ranks) -> None:
    for sizes, said in ranks(without_a_batch_size, 2):
        assert sizes == (4, 1, 4)
        assert said[0] == "ConfigError" and "neither train_batch_size nor" in said[1]


def ways_to_configure(directory):
    config = config_of(optimizer=SGD)
    path = directory / "config.json"
    path.write_text(json.dumps(config))
    typed = shardline.Config.model_validate(config) if hasattr(shardline.Config, "model_validate") else config
    ways = {
        "dict": {"config": config},
        "path": {"config": str(path)},
        "Path": {"config": path},
        "config_params": {"config_params": config},
        "args": {"args": SimpleNamespace(shardline_config=str(path), local_rank=0)},
        "deepspeed args": {"args": SimpleNamespace(deepspeed_config=str(path))},
        "typed": {"config": typed},
    }
    found = {}
    for way, kwargs in ways.items():
        engine, optimizer, loader, scheduler = shardline.initialize(model=seeded(Mlp), **kwargs)
        found[way] = (engine.train_batch_size(), type(optimizer).__name__, loader, scheduler)
        engine.destroy()
    return found


def test_every_way_to_configure(ranks, tmp_path) -> None:
    (found,) = ranks(ways_to_configure, 1, tmp_path)
    assert len(found) == 7 and all(value == (4, "SGD", None, None) for value in found.values())


def local_rank_after_initialize(given):
    args = SimpleNamespace(local_rank=given)
    engine = shardline.initialize(args=args, model=seeded(Mlp), config=config_of(optimizer=SGD))[0]
    engine.destroy()
    return args.local_rank


@pytest.mark.parametrize("given", [-1, 0], ids=["the usual default", "the same on all ranks"])
def test_args_hold_the_local_rank(ranks, given) -> None:
    assert ranks(local_rank_after_initialize, 2, given) == [0, 1]


def test_one_configuration_is_enough() -> None:
    with pytest.raises(shardline.ShardlineError, match="more than once: by config and by config_params"):
        _one_config(None, {}, {})
    assert _one_config(SimpleNamespace(), None, None) is None


def several_refusals():
    model = Mlp()
    config = config_of(optimizer=SGD)
    other = torch.optim.SGD(Mlp().parameters(), lr=0.1)
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    return {
        "model": refused(config=config),
        "class": refused(model=Mlp, config=config),
        "config": refused(model=model),
        "mpu": refused(model=model, config=config, mpu=object()),
        "stranger": refused(model=model, config=config, optimizer=other),
        "callable": refused(model=model, config=config, optimizer=lambda params: "no optimizer"),
        "scheduler alone": refused(model=model, config=config_of(), lr_scheduler=lambda optimizer: None),
        "scheduler elsewhere": refused(model=model, config=config_of(), optimizer=own, lr_scheduler=StepLR(other, 1)),
    }


def test_what_cannot_work_is_said_in_a_sentence(ranks) -> None:
    (said,) = ranks(several_refusals, 1)
    words = {
        "model": "needs a torch.nn.Module",
        "class": "needs a torch.nn.Module",
        "config": "config",
        "mpu": "not supported",
        "stranger": "not a parameter of the model",
        "callable": "returned str",
        "scheduler alone": "without an optimizer",
        "scheduler elsewhere": "attached to another optimizer",
    }
    for case, word in words.items():
        assert said[case] is not None and word in said[case][1] and said[case][1].endswith("."), (case, said[case])


# --- parameters and groups --------------------------------------------------------------------------------------------


def groups_of(model, given):
    optimizer, groups = _optimizer_and_groups(model, None, given, None)
    assert optimizer is None
    names = {p: name for name, p in model.named_parameters()}
    return [[names[p] for p in group["params"]] for group in groups]


def test_parameters_in_every_form() -> None:
    model = Mlp(depth=1)
    model.head.bias.requires_grad_(False)
    everything = [name for name, _ in model.named_parameters()]
    trained = [name for name in everything if name != "head.bias"]
    assert groups_of(model, None) == [trained]
    assert groups_of(model, model.parameters()) == [everything]
    assert groups_of(model, (p for p in model.parameters() if p.dim() == 2)) == [
        [n for n in everything if "weight" in n]
    ]
    assert groups_of(model, {"params": model.head.parameters()}) == [["head.weight", "head.bias"]]
    groups = ({"params": (p for p in part.parameters())} for part in (model.blocks, model.head))
    assert groups_of(model, groups) == [everything[:4], everything[4:]]
    assert groups_of(model, [{"params": []}, {"params": [model.head.weight]}]) == [["head.weight"]]


def with_odd_parameters(kind):
    model = seeded(Mlp)
    given = {"named": model.named_parameters(), "none": [], "no parameter": ["head.weight"]}[kind]
    try:
        engine, optimizer, *_ = shardline.initialize(
            model=model, model_parameters=given, config=config_of(optimizer=SGD)
        )
    except shardline.ShardlineError as error:
        return "sentence", str(error)
    except Exception as error:
        return type(error).__name__, str(error)
    trained = sum(len(group["params"]) for group in optimizer.param_groups)
    engine.destroy()
    return "trains", trained


@pytest.mark.parametrize("kind", ["named", "no parameter", "none"])
def test_odd_parameters_train_or_are_refused_in_a_sentence(ranks, kind) -> None:
    """``model.named_parameters()`` is what torch's own optimizers take as well."""
    (found,) = ranks(with_odd_parameters, 1, kind)
    assert found[0] in ("trains", "sentence"), found


def train_a_part(config, which):
    """Only what is in the groups is trained; a group may hold frozen parameters only."""
    model = seeded(Mlp)
    model.head.bias.requires_grad_(False)
    parts = {
        "head": [{"params": [model.head.weight]}],
        "one frozen group": [{"params": [model.head.bias], "lr": 9.0}, {"params": [model.head.weight]}],
    }
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine, *_ = shardline.initialize(model=model, model_parameters=parts[which], config=config)
    train_a_step(engine)
    after = engine.full_state_dict()
    rates = engine.get_lr()
    engine.destroy()
    return [name for name, value in before.items() if not torch.equal(value, after[name])], rates


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "RMSprop"])
@pytest.mark.parametrize("which", ["head", "one frozen group"])
def test_only_what_is_listed_is_trained(ranks, which, optimizer) -> None:
    config = config_of(optimizer={"type": optimizer, "params": {"lr": 0.5}})
    for changed, rates in ranks(train_a_part, 2, config, which):
        assert changed == ["head.weight"]
        assert rates == ([0.5] if which == "head" else [9.0, 0.5])


# --- optimizers and schedulers ----------------------------------------------------------------------------------------


def halve(step):
    return 0.5**step


def sgd(params):
    return torch.optim.SGD(params, lr=0.5)


def half_each_step(optimizer):
    return LambdaLR(optimizer, halve)


CASES = {
    "instance": lambda model: ({"optimizer": sgd(model.parameters())}, None),
    "callable": lambda model: ({"optimizer": sgd}, None),
    "class": lambda model: ({"optimizer": functools.partial(torch.optim.SGD, lr=0.5)}, None),
    "instance and callable schedule": lambda model: (
        {"optimizer": sgd(model.parameters()), "lr_scheduler": half_each_step}, "half"),
    "callable and callable schedule": lambda model: ({"optimizer": sgd, "lr_scheduler": half_each_step}, "half"),
    "configured and callable schedule": lambda model: ({"lr_scheduler": half_each_step}, "half"),
    "schedule from the configuration": lambda model: ({"optimizer": sgd}, "config"),
}  # fmt: skip


def run_case(case, stage):
    model = seeded(Mlp)
    kwargs, schedule = CASES[case](model)
    config = config_of() | {"zero_optimization": {"stage": stage, "unit_min_numel": 1}}
    if "optimizer" not in kwargs:
        config["optimizer"] = SGD
    if schedule == "config":
        config["scheduler"] = {"type": "ExponentialLR", "params": {"gamma": 0.5}}
    engine, optimizer, _, scheduler = shardline.initialize(model=model, config=config, **kwargs)
    same = engine.optimizer is optimizer and engine.lr_scheduler is scheduler
    if isinstance(kwargs.get("optimizer"), torch.optim.Optimizer):
        same = same and optimizer is kwargs["optimizer"]
    rates = []
    for _ in range(3):
        rates.append(engine.get_lr()[0])
        train_a_step(engine)
    state = engine.full_state_dict()
    engine.destroy()
    return same, rates, state, schedule


@pytest.mark.parametrize("case", CASES)
def test_optimizers_and_schedules_in_every_form(ranks, case) -> None:
    """All do what plain SGD does with the same rates."""
    for stage in (1, 3):
        for same, rates, state, schedule in ranks(run_case, 2, case, stage):
            assert same and rates == ([0.5, 0.25, 0.125] if schedule else [0.5] * 3)
            model = seeded(Mlp)
            for rate in rates:
                model.zero_grad()
                mse(model, model, regression(4)).backward()
                with torch.no_grad():
                    for p in model.parameters():
                        p.sub_(p.grad, alpha=rate)
            for name, value in model.state_dict().items():
                torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)


def attached(stage):
    """A scheduler that was attached to the optimizer before, and one that the engine was not given."""
    model = seeded(Mlp)
    optimizer = sgd(model.parameters())
    given, silent = LambdaLR(optimizer, halve), StepLR(optimizer, 2, gamma=0.1)
    engine, *_, scheduler = shardline.initialize(
        model=model, config=config_of() | {"zero_optimization": {"stage": stage, "unit_min_numel": 1}},
        optimizer=optimizer, lr_scheduler=given,
    )  # fmt: skip
    rates = []
    for _ in range(4):
        train_a_step(engine)
        silent.step()
        rates.append(engine.get_lr()[0])
    same = scheduler is given and given.get_last_lr() == [given._last_lr[0]]
    engine.destroy()
    return rates, same


@pytest.mark.parametrize("stage", [0, 3])
def test_attached_schedulers_go_on(ranks, stage) -> None:
    """As two schedulers on plain SGD; a warning of torch's would fail this too."""
    p = nn.Parameter(torch.zeros(1))
    optimizer = sgd([p])
    first, second = LambdaLR(optimizer, halve), StepLR(optimizer, 2, gamma=0.1)
    expected = []
    for _ in range(4):
        optimizer.step()
        first.step()
        second.step()
        expected.append(optimizer.param_groups[0]["lr"])
    for rates, same in ranks(attached, 2, stage):
        assert rates == pytest.approx(expected) and same


SCHEDULES = {
    "chained": lambda o: ChainedScheduler([LinearLR(o, 0.5, total_iters=2), StepLR(o, 1)], o),
    "plateau": lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0),
    "partial": functools.partial(StepLR, step_size=1, gamma=0.5),
    "class": LinearLR,
}


def odd_schedule(kind):
    engine, *_ = shardline.initialize(model=seeded(Mlp), config=config_of(optimizer=SGD), lr_scheduler=SCHEDULES[kind])
    try:
        rates = [engine.get_lr()[0]]
        for turn in range(3):
            engine.backward(mse(engine, engine.module, regression(4)))
            engine.step(**({"lr_kwargs": {"metrics": turn}} if kind == "plateau" else {}))
            rates.append(engine.get_lr()[0])
        return rates, None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    finally:
        engine.destroy()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("chained", [0.25, 0.0375, 0.005, 0.0005]),
        ("plateau", [0.5, 0.5, 0.25, 0.125]),
        ("partial", [0.5, 0.25, 0.125, 0.0625]),
        ("class", [1 / 6, 7 / 30, 0.3, 11 / 30]),
    ],
)
def test_schedules_of_other_kinds(ranks, kind, expected) -> None:
    (found,) = ranks(odd_schedule, 1, kind)
    assert found == (pytest.approx(expected), None)


# --- the rest ---------------------------------------------------------------------------------------------------------


class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        return torch.full((32,), float(i)), torch.zeros(32)


def stacked(samples):
    return torch.stack([x for x, _ in samples]), len(samples)


def with_data():
    engine, _, loader, _ = shardline.initialize(
        model=seeded(Mlp), config=config_of(optimizer=SGD), training_data=Pairs(), collate_fn=stacked
    )
    seen = [(x[:, 0].tolist(), count) for x, count in loader]
    same = engine.training_dataloader is loader
    engine.destroy()
    return seen, same


def test_training_data_and_collate_fn(ranks) -> None:
    results = ranks(with_data, 2)
    assert all(same for _, same in results)
    assert sorted(i for seen, _ in results for xs, _ in seen for i in xs) == list(range(10))
    assert all(count == len(xs) for seen, _ in results for xs, count in seen)


def told_at_initialize(*configs):
    """The notices of each."""
    notices = []
    original = shardline.events.Events.emit

    def emit(self, event):
        notices[-1].append(event)
        original(self, event)

    shardline.events.Events.emit = emit
    try:
        for config in configs:
            notices.append([])
            shardline.initialize(model=seeded(Mlp), config=config)[0].destroy()
    finally:
        shardline.events.Events.emit = original
    return [[event.message for event in events if hasattr(event, "message")] for events in notices]


def test_keys_without_effect_are_listed_once(ranks) -> None:
    config = config_of(optimizer=SGD)
    config["zero_optimization"] |= {"overlap_comm": True, "contiguous_gradients": True}
    ((messages,),) = ranks(told_at_initialize, 1, config)
    assert len(messages) == 1
    assert "zero_optimization.overlap_comm" in messages[0] and "contiguous_gradients" in messages[0]


def test_offload_param_has_no_effect_where_the_model_computes_on_the_cpu(ranks) -> None:
    zero = {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": False}}
    configs = [config_of(optimizer=SGD) | {"zero_optimization": zero | {"stage": stage}} for stage in (2, 3)]
    for told in ranks(told_at_initialize, 2, *configs):
        assert [[message for message in messages if "offload_param has no effect" in message] for messages in told] == [
            ["offload_param has no effect: weights stay where the model computes"]
        ] * 2


def test_offload_param_elsewhere_says_what_to_do() -> None:
    def config(**offload):
        return load_config(config_of(zero_optimization={"stage": 3, "offload_param": offload}), 2)

    with pytest.raises(shardline.ConfigError, match="If the model fits, delete offload_param from the configuration"):
        _refuse_offload_param(config(device="cpu"), torch.device("cuda"))
    _refuse_offload_param(config(device="none"), torch.device("cuda"))
    _refuse_offload_param(config(device="cpu"), torch.device("cpu"))


def in_half_of_the_world():
    """Two engines over two sub-meshes train on their own."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("other", "data"))
    import torch.distributed as dist

    config = config_of(optimizer=SGD) | {"zero_optimization": {"stage": 3, "unit_min_numel": 1,
                                                              "stage3_param_persistence_threshold": 0}}  # fmt: skip
    try:
        shardline.initialize(model=seeded(Mlp), config=config, mesh=mesh)
        said = None
    except shardline.ShardlineError as error:
        said = str(error)
    engine, *_ = shardline.initialize(model=seeded(Mlp), config=config, mesh=mesh["data"])
    half = dist.get_rank() // 2
    engine.backward(mse(engine, engine.module, regression(4, seed=half)))
    engine.step()
    state = engine.full_state_dict()
    sizes = engine.world_size, engine.train_batch_size()
    places = engine.global_rank, engine.topology.rank, bool(engine.events._sinks)
    engine.destroy()
    return state["head.weight"], sizes, said, places


def test_a_mesh_names_the_ranks(ranks) -> None:
    results = ranks(in_half_of_the_world, 4)
    weights = [weight for weight, *_ in results]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[0], weights[2])
    for _, sizes, said, _ in results:
        assert sizes == (2, 8) and "2 dimensions" in said
    # Of its engine's group, of the job; and whether it writes to the console: one rank of each group does.
    assert [places for *_, places in results] == [(0, 0, True), (1, 1, False), (0, 2, True), (1, 3, False)]


# --- what is said where something costs more than it must -------------------------------------------------------------


class OfAll(torch.optim.SGD):
    shardline_kind = "global"


def advice(local_world_size):
    os.environ["LOCAL_WORLD_SIZE"] = str(local_world_size)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sinks, "attach", lambda self, events, *args: events.subscribe(said.append))
        for stage, dtype, own in ((0, "bf16", None), (1, "bf16", None), (0, "fp32", None), (0, "bf16", OfAll)):
            settings = {
                "train_micro_batch_size_per_gpu": 1,
                dtype: {"enabled": True},
                "zero_optimization": {"stage": stage},
                "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            }
            if dtype == "fp32":
                del settings[dtype]
            if own is not None:
                del settings["optimizer"]
            said.append((stage, dtype, own is None))
            make = None if own is None else lambda params: OfAll(params, lr=0.1)
            shardline.initialize(model=nn.Linear(64, 64), config=settings, optimizer=make)[0].destroy()
    found, where = [], None
    for event in said:
        if isinstance(event, tuple):
            where = event
        elif isinstance(event, Notice) and "set zero_optimization.stage to 1" in event.message:
            found.append(where)
    return found


def test_stage_0_between_hosts_in_low_precision_is_advised_against(ranks):
    assert ranks(advice, 2, 1) == [[(0, "bf16", True)]] * 2
    assert ranks(advice, 2, 2) == [[]] * 2
